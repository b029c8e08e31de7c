"""`CompareConfig`: what `mpdqn compare` measures; and the checks that come before any work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpdqn.arrangement import check_parameters
from mpdqn.dqn.agents import make_agent
from mpdqn.environments import EnvironmentSpec, environment_spec
from mpdqn.layouts import Layout, default_layouts
from mpdqn.mesh import (
    check_device,
    check_world_size,
    launched,
    launched_local_world_size,
    launched_rank,
    launched_world_size,
)
from mpdqn.networks import NetworkFunction, load_network
from mpdqn.plan import RECOMPUTATION
from mpdqn.records import Environment
from mpdqn.schedule import SCHEDULES
from mpdqn.train.check import check_writable


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare data- and pipeline-parallel training of one network on one environment."""

    env: str = "pong"
    """Atari game."""
    network: str = "resnet18"
    """nature, impala, minatar, resnet18, resnet34, resnet50, resnet101, or your own as my_file.py:make_network."""
    width: float | None = None
    """Width multiplier of IMPALA."""
    head: Literal["plain", "dueling"] | None = None
    """Head of the network; default: the agent's."""
    agent: str = "double_dqn"
    """dqn, double_dqn, dueling_dqn, prioritized_dqn, c51, noisy_dqn, rainbow, dopamine_rainbow, munchausen_dqn,
    hl_gauss or decqn (docs/agents.md); prioritized ones are compared on uniform batches."""
    batch_size: int = 64
    """Transitions in an update, over all replicas."""
    num_microbatches: int = 8
    """m of the pipelines, and of the second row of the single process."""
    layouts: tuple[str, ...] = ()
    """Rows to measure, like single@1 dp2 pp2-1f1b/m8 dp2xpp2-gpipe (docs/layouts.md); default: the main job's."""
    lookahead: Literal[0, 1] = 1
    """How many updates early a batch is sampled, in every row; with 1 td1f1b and tdzb fill their gaps."""
    recompute: Literal["none", "boundaries", "all", "auto"] = "none"
    """What every stage computes again in its backward to save memory; auto: as much as it takes to fit."""
    memory_limit: float = 0.0
    """GiB that --recompute auto lets a rank's parameters and activations take; 0: its share of this machine's."""
    trace: bool = False
    """Write what each rank does in two more updates of each row: traces/*.json (Perfetto), .svg and .png."""
    steps: int = 2
    """Updates timed in each round of a layout, after one to warm up."""
    rounds: int = 3
    """Rounds; in each, every layout has its turn."""
    transitions: int = 2048
    """Transitions to collect first, at least."""
    num_shards: int = 4
    """Virtual replay shards V; the replicas of every layout share them evenly."""
    envs_per_shard: int = 2
    """Environments that fill each shard."""
    epsilon: float = 0.1
    """Share of random actions while collecting."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks are."""
    seed: int = 0
    """Seed of everything."""
    out: Path = Path("results/compare")
    """Folder in which the run's folder is made."""
    timeout: float = 45.0
    """Seconds of silence (no heartbeat) after which a rank is lost and the run ends with an error."""
    smoke: bool = False
    """A run of seconds that exercises everything and measures nothing worth quoting."""
    render_only: Path | None = None
    """Only redraw table and plots from the records in this run folder."""

    def resolved(self) -> CompareConfig:
        """This configuration; if ``smoke`` is set, small in all that is left at its default."""
        if not self.smoke:
            return self
        small: dict[str, Any] = {"network": "nature", "batch_size": 16, "num_microbatches": 2}
        small |= {"steps": 1, "rounds": 2, "transitions": 256}
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return replace(self, **{name: value for name, value in small.items() if name not in given})


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked comparison: everything the workers need."""

    config: CompareConfig
    network: str | NetworkFunction
    network_name: str
    spec: EnvironmentSpec
    layouts: tuple[Layout, ...]
    cores: tuple[int, ...]
    environment: Environment

    @property
    def head(self) -> str:
        """The head of the network: the configured one, or the agent's."""
        return self.config.head or str(make_agent(self.config.agent).head_options()["head"])

    @property
    def num_ranks(self) -> int:
        """How many processes the widest layout needs."""
        return max(layout.ranks for layout in self.layouts)

    def make_network(self, stream: int = 0) -> nn.Sequential:
        """The network, with the same weights on every call and every rank; other ``stream``s draw other weights."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* has no effect on")  # `check` has said so
            return _load(self.config, self.network, self.spec, self.config.seed + stream)


def check(config: CompareConfig, network: str | NetworkFunction | None = None, layouts: Sequence[str] = ()) -> Job:
    """Every check that needs no worker: one clear ValueError for bad input, on every rank alike.

    Args:
        config: what to compare.
        network: instead of ``config.network``, a function from (observation shape, number of actions) to a module.
        layouts: instead of ``config.layouts``.
    """
    config = config.resolved()
    for name in ("steps", "rounds", "transitions", "num_microbatches", "envs_per_shard"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)} but must be at least 1")
    if config.lookahead not in (0, 1):
        raise ValueError(f"lookahead is {config.lookahead} but must be 0 or 1")
    if config.recompute not in (*RECOMPUTATION, "auto"):
        raise ValueError(f"unknown recompute {config.recompute!r}; choose {', '.join(RECOMPUTATION)} or auto")
    if not config.memory_limit >= 0:
        raise ValueError(f"memory_limit is {config.memory_limit} GiB but must be at least 0")
    if config.memory_limit and config.recompute != "auto":
        raise ValueError(
            f"memory_limit {config.memory_limit} has no effect with recompute {config.recompute}; use --recompute auto"
        )
    if not config.timeout > 0:
        raise ValueError(f"timeout is {config.timeout} s but must be above 0")
    if not 0 <= config.epsilon <= 1:
        raise ValueError(f"epsilon is {config.epsilon} but must be between 0 and 1")
    check_device(config.device)
    make_agent(config.agent)
    spec = environment_spec(config.env)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    devices = torch.cuda.device_count() if config.device == "cuda" else 0
    texts = tuple(layouts) or config.layouts
    world_size = launched_world_size() if launched() else None
    if texts:
        rows = [Layout.parse(t, num_microbatches=config.num_microbatches, cores=len(cores)) for t in texts]
    else:
        rows = default_layouts(config.num_microbatches, len(cores), config.num_shards, devices, world_size)
    rows = list(dict.fromkeys(rows))
    if world_size is not None:
        check_world_size(max(row.ranks for row in rows), world_size)
    job = Job(
        config=config,
        network=network or config.network,
        network_name=_name(network or config.network, config.width),
        spec=spec,
        layouts=tuple(rows),
        cores=cores,
        environment=Environment.current(f"{devices} × {torch.cuda.get_device_name()}" if devices else ""),
    )
    chain = _load(config, job.network, spec, config.seed)
    trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in chain)
    for row in rows:
        here = job.num_ranks if world_size is None else launched_local_world_size()
        if 0 < devices < here and row.pipeline > 1 and not row.stacked:
            raise ValueError(
                f"layout {row.name} sends messages between GPUs but {here} ranks share {devices} here; "
                "write +stacked, as in pp2-1f1b+stacked, or choose layouts of fewer ranks"
            )
        row.parallelism.check_batch(config.batch_size)
        row.parallelism.check_shards(config.num_shards, config.batch_size)
        if row.parallelism.num_stages > trained:
            raise ValueError(
                f"layout {row.name} wants p·v = {row.parallelism.num_stages} stages but {job.network_name} has "
                f"{len(chain)} layers in its nn.Sequential, {trained} of them with parameters to train, and every "
                "stage needs one; use at most that many stages, or return a flat nn.Sequential of more layers"
            )
        if config.memory_limit:  # a rank has at least its share of the parameters, however they are cut
            held = sum(p.numel() * p.element_size() for p in chain.parameters())
            check_parameters(row, held * row.copies * row.data / row.ranks, config.memory_limit * 2**30)
    filled = [row.name for row in rows if SCHEDULES[row.schedule].filled]
    if filled and not config.lookahead and launched_rank() == 0:
        warnings.warn(
            f"with --lookahead 0 no target pass can run ahead, so no gaps are filled in {', '.join(filled)}; set "
            "--lookahead 1",
            stacklevel=2,
        )
    check_writable(config.out)
    return job


def _load(config: CompareConfig, network: str | NetworkFunction, spec: EnvironmentSpec, seed: int) -> nn.Sequential:
    options = make_agent(config.agent).head_options()
    if config.head:
        options["head"] = config.head
    return load_network(network, spec.observation_shape, spec.num_actions, width=config.width, seed=seed, **options)


def _name(network: str | NetworkFunction, width: float | None) -> str:
    name = network if isinstance(network, str) else getattr(network, "__name__", type(network).__name__)
    return f"{name} ×{width:g}" if width is not None else name
