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
from mpdqn.dqn.published import brought_to, published
from mpdqn.environments import EnvironmentSpec, environment_spec
from mpdqn.launched import launched, launched_local_world_size, launched_rank, launched_world_size
from mpdqn.layouts import Layout, default_layouts
from mpdqn.mesh import check_world_size
from mpdqn.networks import NetworkFunction
from mpdqn.records import Environment, without_place
from mpdqn.workload import Workload
from mpdqn.workload.checks import (
    check_actions,
    check_arithmetic,
    check_at_least,
    check_division,
    check_gpu_sharing,
    check_stages,
    check_update,
    check_writable,
    warn_of_gaps,
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare data- and pipeline-parallel training of one network on one environment."""

    env: str = "pong"
    """Atari or MinAtar game, driving, robot, or any Gymnasium id with pixels (docs/environments.md)."""
    network: str = "resnet18"
    """nature, impala, minatar, resnet18, resnet34, resnet50, resnet101, or your own as my_file.py:make_network; ""
    is nature, or minatar for frames too small for it."""
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
    """m of the default layouts' pipelines and of their second single process; layouts that you name say it themselves,
    like pp2-1f1b/m4, and have 8 if they do not."""
    layouts: tuple[str, ...] = ()
    """Rows to measure, like single@1 dp2 pp2-1f1b/m8 dp2xpp2-gpipe (docs/layouts.md); default: the main job's."""
    lookahead: Literal[0, 1] = 1
    """How many updates early a batch is sampled, in every row; with 1 td1f1b and tdzb fill their gaps."""
    recompute: Literal["none", "boundaries", "all", "auto"] = "none"
    """What every stage computes again in its backward to save memory; auto: as much as it takes to fit."""
    memory_limit: float = 0.0
    """GiB that --recompute auto lets a rank's parameters and activations take; 0: its share of this machine's."""
    precision: Literal["float32", "tf32", "bf16", "auto"] = "auto"
    """Precision of products and convolutions; auto: on a GPU the fastest for each row, measured; on the CPU float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the stages; auto: on a GPU where it is measured to win, on the CPU off."""
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
        small: dict[str, Any] = {"network": "", "batch_size": 16, "num_microbatches": 2}
        small |= {"steps": 1, "rounds": 2, "transitions": 256}
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return replace(self, **{name: value for name, value in small.items() if name not in given})


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked comparison: everything the workers need."""

    config: CompareConfig
    workload: Workload
    layouts: tuple[Layout, ...]
    cores: tuple[int, ...]
    environment: Environment

    @property
    def spec(self) -> EnvironmentSpec:
        """Shapes and actions of one of the environments."""
        return self.workload.spec

    @property
    def head(self) -> str:
        """The head of the network: the configured one, or the agent's."""
        return str(self.workload.head_options["head"])

    @property
    def network_name(self) -> str:
        """Name of the network in tables, records and the folder's name: one's own file without its absolute path."""
        name, width = without_place(self.workload.network_name), self.config.width
        return f"{name} ×{width:g}" if width is not None else name

    @property
    def num_ranks(self) -> int:
        """How many processes the widest layout needs."""
        return max(layout.ranks for layout in self.layouts)

    @property
    def num_microbatches(self) -> int:
        """The largest m of the layouts: the layers are measured on the smallest part of a batch that a replica runs."""
        return max(layout.num_microbatches for layout in self.layouts)

    def make_network(self, stream: int = 0) -> nn.Sequential:
        """Return the network, with the same weights on every call and every rank; other ``stream``s have others."""
        return self.workload.make_network(stream=stream)


def check(config: CompareConfig, network: str | NetworkFunction | None = None, layouts: Sequence[str] = ()) -> Job:
    """Every check that needs no worker: one clear ValueError for bad input, on every rank alike.

    Args:
        config: what to compare.
        network: instead of ``config.network``, a function from (observation shape, number of actions) to a module.
        layouts: instead of ``config.layouts``.
    """
    texts = tuple(layouts) or config.layouts
    if texts and config.num_microbatches != CompareConfig.num_microbatches and launched_rank() == 0:
        warnings.warn(
            f"num_microbatches {config.num_microbatches} has no effect on named layouts; write it in them, "
            f"as in pp2-1f1b/m{config.num_microbatches}",
            stacklevel=2,
        )
    config = config.resolved()
    check_at_least(config, 1, "steps", "rounds", "transitions", "num_microbatches", "envs_per_shard")
    check_update(config, "auto")
    if not config.memory_limit >= 0:
        raise ValueError(f"memory_limit is {config.memory_limit} GiB but must be at least 0")
    if config.memory_limit and config.recompute != "auto":
        raise ValueError(
            f"memory_limit {config.memory_limit} has no effect with recompute {config.recompute}; use --recompute auto"
        )
    if not 0 <= config.epsilon <= 1:
        raise ValueError(f"epsilon is {config.epsilon} but must be between 0 and 1")
    check_arithmetic(device=config.device, precision=config.precision, compile=config.compile)
    workload = _workload(config, network)
    check_actions(workload)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    devices = torch.cuda.device_count() if config.device == "cuda" else 0
    world_size = launched_world_size() if launched() else None
    if texts:
        rows = [Layout.parse(t, cores=len(cores)) for t in texts]
    else:
        rows = default_layouts(config.num_microbatches, len(cores), config.num_shards, devices, world_size)
    rows = list(dict.fromkeys(rows))
    if world_size is not None:
        check_world_size(max(row.ranks for row in rows), world_size)
    job = Job(
        config=config,
        workload=workload,
        layouts=tuple(rows),
        cores=cores,
        environment=Environment.current(f"{devices} × {torch.cuda.get_device_name()}" if devices else ""),
    )
    chain = workload.make_network(warn=True)
    here = job.num_ranks if world_size is None else launched_local_world_size()
    for row in rows:
        check_gpu_sharing(row, here, devices)
        check_division(row, workload)
        check_stages([row], chain, job.network_name)
        if config.memory_limit:  # a rank has at least its share of the parameters, however they are cut
            held = sum(p.numel() * p.element_size() for p in chain.parameters())
            check_parameters(row, held * row.copies * row.data / row.ranks, config.memory_limit * 2**30)
    _check_transitions(job)
    warn_of_gaps(rows, config.lookahead)
    check_writable(config.out)
    return job


def _workload(config: CompareConfig, network: str | NetworkFunction | None) -> Workload:
    """Return what `mpdqn train` would train, but on uniform batches of ``config.transitions`` transitions."""
    spec = environment_spec(config.env)
    settings = replace(
        brought_to(published(config.agent), spec.name, spec.field),
        batch_size=config.batch_size,
        capacity=config.transitions,
        prioritization=None,
    )
    return Workload(
        env=config.env,
        spec=spec,
        settings=settings,
        network=network or config.network,
        width=config.width,
        head=config.head,
        num_shards=config.num_shards,
        envs_per_shard=config.envs_per_shard,
        seed=config.seed,
    )


def _check_transitions(job: Job) -> None:
    """Raise ValueError unless every shard will hold enough transitions for its part of a batch."""
    workload = job.workload
    if job.config.transitions < workload.least_transitions:
        raise ValueError(
            f"transitions is {job.config.transitions} but batch_size {job.config.batch_size} and {workload.num_envs} "
            f"environments with {workload.settings.n_step}-step returns need at least {workload.least_transitions}; "
            "raise --transitions"
        )
