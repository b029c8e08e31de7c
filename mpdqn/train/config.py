"""`TrainConfig`: what `mpdqn train` trains; and the checks that come before any work."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpdqn.dqn.agents import Agent
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.dqn.published import Published, published
from mpdqn.environments import EnvironmentSpec, environment_spec
from mpdqn.launch import check_port
from mpdqn.layouts import Layout
from mpdqn.logs import check_logs
from mpdqn.mesh import check_device, launched, launched_local_world_size, launched_world_size
from mpdqn.networks import load_network, set_memory_format
from mpdqn.plan import RECOMPUTATION
from mpdqn.records import Environment
from mpdqn.replay.limiter import RateLimiter
from mpdqn.schedule import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train an agent of the DQN family on one environment, on any layout.

    What is left at its default is as the agent was published (docs/agents.md).
    """

    env: str = "pong"
    """Atari or MinAtar game, driving, robot, or any Gymnasium id with pixels (docs/environments.md)."""
    agent: str = "dqn"
    """Published settings: dqn, double_dqn, c51, rainbow … (docs/agents.md)."""
    network: str = ""
    """A zoo name, or my_file.py:make_network; default: nature, or minatar for frames too small for it."""
    width: float | None = None
    """Width multiplier of IMPALA."""
    layout: str = "single@all"
    """Like single@1, dp2, pp2-td1f1b/m4 or dp2xpp2-1f1b (docs/layouts.md)."""
    frames: int = 10_000_000
    """Environment frames to play; 4 for each agent step of an Atari game."""
    double: bool | None = None
    """Double DQN's target."""
    dueling: bool | None = None
    """Dueling head."""
    noisy: bool | None = None
    """Noisy layers at the end of the network."""
    prioritized: bool | None = None
    """Prioritised replay."""
    n_step: int | None = None
    """Rewards in a return."""
    batch_size: int | None = None
    """Transitions in an update, over all replicas."""
    learning_rate: float | None = None
    """Adam's step size."""
    replay_period: int | None = None
    """Agent steps for each update: the samples per insert are batch_size / replay_period."""
    min_replay: int | None = None
    """Transitions in replay before the first update."""
    capacity: int | None = None
    """Transitions that replay holds."""
    target_period: int | None = None
    """Updates between two refreshes of the target network."""
    target_tau: float | None = None
    """τ of target ← τ·online + (1 − τ)·target; 1 copies."""
    epsilon_decay_frames: int | None = None
    """Frames over which ε falls."""
    evaluation_epsilon: float | None = None
    """ε of evaluation episodes."""
    lookahead: Literal[0, 1] = 0
    """How many updates early a batch is announced; with 1 td1f1b and tdzb fill their gaps."""
    prefetch: Literal[0, 1] = 0
    """How many updates earlier still it is drawn, to be prepared while the update before trains."""
    recompute: Literal["none", "boundaries", "all"] = "none"
    """What every stage computes again in its backward to save memory."""
    num_shards: int = 4
    """Virtual replay shards V; the replicas of the layout share them evenly."""
    envs_per_shard: int = 2
    """Environments that fill each shard."""
    round_steps: int = 1
    """Steps of every environment in a round; the updates that are due follow each round."""
    actor_lag: int = 0
    """How many rounds older than the newest the acting weights are; from 1 on, acting overlaps with learning."""
    actors: Literal["inline", "workers"] = "inline"
    """Where the environments are played: by the rank of a replica's first stage, or by one more rank per replica."""
    env_workers: int = 0
    """Processes that step slow simulators, for each acting rank; 0 steps them in the acting rank itself."""
    replay_dir: Path | None = None
    """Folder in which replay is mapped to disk; default: memory."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the networks."""
    precision: Literal["float32", "tf32", "bf16", "auto"] = "auto"
    """Of products and convolutions; auto: on a GPU the fastest as measured, on the CPU float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the stages; auto: on a GPU where it is measured to win, on the CPU off."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the networks are."""
    evaluate_every: int = 0
    """Frames between two evaluations during training; 0: only at the end."""
    evaluation_episodes: int = 10
    """Episodes of an evaluation; 0: none."""
    log_every: int = 0
    """Frames between two rows of progress; 0: a hundredth of the run, at most 40,000."""
    seed: int = 0
    """Seed of everything."""
    out: Path = Path("results/train")
    """Folder in which the run's folder is made."""
    wandb: bool = False
    """Log to Weights & Biases, too."""
    timeout: float = 60.0
    """Seconds a rank waits for a message before the run ends with an error."""
    port: int = 0
    """TCP port of the workers' rendezvous; 0 takes a free one."""
    smoke: bool = False
    """A run of seconds that exercises everything and learns nothing."""

    def resolved(self) -> TrainConfig:
        """This configuration; if ``smoke`` is set, small in all that is left at its default."""
        if not self.smoke:
            return self
        small: dict[str, Any] = {"frames": 3_000, "min_replay": 256, "capacity": 2_000, "evaluation_episodes": 2}
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return replace(self, **{name: value for name, value in small.items() if name not in given})


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A checked training run: everything a rank needs."""

    config: TrainConfig
    settings: Published
    spec: EnvironmentSpec
    layout: Layout
    cores: tuple[int, ...]
    environment: Environment

    @property
    def agent(self) -> Agent:
        """The agent, with the switches of the command line."""
        return self.settings.agent

    @property
    def num_ranks(self) -> int:
        """Learner ranks, and with workers one acting rank for each replica."""
        return self.layout.ranks + (self.layout.data if self.config.actors == "workers" else 0)

    @property
    def num_envs(self) -> int:
        """V·E."""
        return self.config.num_shards * self.config.envs_per_shard

    @property
    def transitions_per_round(self) -> int:
        """What all environments together add in a round."""
        return self.num_envs * self.config.round_steps

    @property
    def num_rounds(self) -> int:
        """Rounds until the frames are played, rounded up."""
        return math.ceil(self.config.frames / (self.transitions_per_round * self.spec.frames_per_action))

    @property
    def limiter(self) -> RateLimiter:
        """How many updates are due."""
        return RateLimiter(min_replay=self.settings.min_replay, period=self.settings.replay_period)

    def frames_after(self, rounds: int) -> int:
        """Environment frames that are played in ``rounds`` rounds."""
        return rounds * self.transitions_per_round * self.spec.frames_per_action

    def updates_after(self, rounds: int) -> int:
        """Updates that are made in ``rounds`` rounds."""
        return self.limiter.updates_due(rounds * self.transitions_per_round)

    def logs_after(self, r: int) -> bool:
        """Whether a row of progress is due after round ``r``, counted from 0."""
        every = self.config.log_every or min(40_000, math.ceil(self.config.frames / 100))
        return self._crosses(r, every) or r + 1 == self.num_rounds

    def evaluates_after(self, r: int) -> bool:
        """Whether an evaluation is due after round ``r``."""
        if not self.config.evaluation_episodes:
            return False
        return self._crosses(r, self.config.evaluate_every) or r + 1 == self.num_rounds

    def _crosses(self, r: int, every: int) -> bool:
        return every > 0 and self.frames_after(r + 1) // every > self.frames_after(r) // every

    @property
    def network_name(self) -> str:
        """The zoo's name or the file of the network."""
        return self.config.network or default_network(self.spec)

    def make_network(self) -> nn.Sequential:
        """The network on the CPU, with the same weights on every call and every rank."""
        network = load_network(
            self.network_name,
            self.spec.observation_shape,
            self.spec.num_actions,
            width=self.config.width,
            seed=self.config.seed,
            **self.agent.head_options(self.spec.branches),
        ).to(dtype=getattr(torch, self.config.dtype))
        # Measured once for all: channels_last nearly halves IMPALA's step on a CPU, is what cuDNN wants, and costs the
        # others nothing. A format that is measured anew in every run would make runs differ by their rounding.
        set_memory_format(network, "channels_last")
        return network


def default_network(spec: EnvironmentSpec) -> str:
    """The Nature network, or MinAtar's for frames that are too small for it."""
    return "nature" if min(spec.observation_shape[1:]) >= 36 else "minatar"


def check(config: TrainConfig) -> TrainJob:
    """Every check that needs no worker: one clear ValueError for bad input, on every rank alike."""
    config = config.resolved()
    for name in ("frames", "num_shards", "envs_per_shard", "round_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)} but must be at least 1")
    least_0 = ("actor_lag", "env_workers", "evaluate_every", "evaluation_episodes", "log_every", "epsilon_decay_frames")
    for name in least_0:
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(config, name)} but must be at least 0")
    for name in ("lookahead", "prefetch"):
        if getattr(config, name) not in (0, 1):
            raise ValueError(f"{name} is {getattr(config, name)} but must be 0 or 1")
    if config.recompute not in RECOMPUTATION:
        raise ValueError(f"unknown recompute {config.recompute!r}; choose {', '.join(RECOMPUTATION)}")
    if config.dtype == "float64" and config.precision not in ("auto", "float32"):
        raise ValueError(f"precision {config.precision} has no effect on dtype float64; leave one of them")
    if config.device == "cpu" and config.precision == "tf32":
        raise ValueError("precision tf32 is CUDA's, and --device is cpu; use float32 or bf16")
    if not config.timeout > 0:
        raise ValueError(f"timeout is {config.timeout} s but must be above 0")
    check_device(config.device)
    settings = _settings(config)
    spec = environment_spec(config.env)
    _check_actions(config, settings, spec)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    layout = Layout.parse(config.layout, num_microbatches=4, cores=len(cores))
    if layout.copies > 1:
        raise ValueError(f"layout {layout.name} is {layout.copies} runs; train one at a time, each with its --seed")
    layout.parallelism.check_batch(settings.batch_size)
    layout.parallelism.check_shards(config.num_shards, settings.batch_size)
    devices = torch.cuda.device_count() if config.device == "cuda" else 0
    job = TrainJob(
        config=config,
        settings=settings,
        spec=spec,
        layout=layout,
        cores=cores,
        environment=Environment.current(f"{devices} × {torch.cuda.get_device_name()}" if devices else ""),
    )
    _check_replay(job)
    _check_ranks(job, devices)
    _check_network(job)
    if SCHEDULES[layout.schedule].filled and layout.pipeline > 1 and not config.lookahead:
        warnings.warn(
            f"with --lookahead 0 no target pass can run ahead, so no gaps are filled in {layout.name}; set "
            "--lookahead 1",
            stacklevel=2,
        )
    check_logs(wandb=config.wandb)
    check_writable(config.out)
    return job


def _settings(config: TrainConfig) -> Published:
    """The agent's published settings, with what the configuration says otherwise."""
    base = published(config.agent)
    positive = ["n_step", "batch_size", "learning_rate", "replay_period", "capacity", "target_period", "target_tau"]
    names = [*positive, "min_replay", "evaluation_epsilon"]
    given: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    for name in positive:
        if name in given and not given[name] > 0:
            raise ValueError(f"{name} is {given[name]} but must be above 0")
    switches = {name: value for name in ("double", "dueling", "noisy") if (value := getattr(config, name)) is not None}
    if switches:
        given["agent"] = replace(base.agent, **switches)
    if config.prioritized is not None:
        given["prioritization"] = (base.prioritization or Prioritization()) if config.prioritized else None
    if config.epsilon_decay_frames is not None:
        given["epsilon"] = replace(base.epsilon, decay_frames=config.epsilon_decay_frames)
    return replace(base, **given)


def _check_actions(config: TrainConfig, settings: Published, spec: EnvironmentSpec) -> None:
    if spec.branches and not settings.agent.branching:
        raise ValueError(
            f"environment {config.env} has {spec.branches} action dimensions of {spec.num_actions} choices each, but "
            f"agent {config.agent} has one head of discrete actions; use --agent decqn, whose head branches"
        )
    if settings.agent.branching and not spec.branches:
        raise ValueError(
            f"agent {config.agent} has a branching head but environment {config.env} has 1 discrete action of "
            f"{spec.num_actions} choices; use --agent dqn or another without branches"
        )


def _check_replay(job: TrainJob) -> None:
    settings, config = job.settings, job.config
    # Each shard must be able to give its part of a batch; rows at the head of a ring wait for their n-step return.
    least = settings.batch_size + job.num_envs * settings.n_step
    if settings.min_replay < least:
        raise ValueError(
            f"min_replay is {settings.min_replay} but batch_size {settings.batch_size} and {job.num_envs} environments "
            f"with {settings.n_step}-step returns need at least {least} transitions before the first update"
        )
    if settings.capacity < settings.min_replay:
        raise ValueError(
            f"capacity is {settings.capacity} but learning begins at {settings.min_replay} transitions (--min-replay); "
            "raise the one or lower the other"
        )
    if not job.updates_after(job.num_rounds):
        warnings.warn(
            f"{config.frames} frames are {config.frames // job.spec.frames_per_action} agent steps, but learning "
            f"begins at {settings.min_replay}: nothing will be learned; raise --frames or lower --min-replay",
            stacklevel=3,
        )


def _check_ranks(job: TrainJob, devices: int) -> None:
    config, layout = job.config, job.layout
    if config.actors not in ("inline", "workers"):
        raise ValueError(f"unknown actors {config.actors!r}; choose inline or workers")
    if config.actors == "workers" and config.device == "cuda":
        raise ValueError("--actors workers acts on the CPU and is not there for --device cuda yet; use --actors inline")
    if launched():
        if job.num_ranks != launched_world_size():
            raise ValueError(
                f"layout {layout.name} with {config.actors} actors needs {job.num_ranks} ranks but "
                f"{launched_world_size()} processes were started; use --nproc-per-node {job.num_ranks}"
            )
    else:
        check_port(config.port)
    here = launched_local_world_size() if launched() else layout.ranks
    if 0 < devices < here and layout.pipeline > 1 and not layout.stacked:
        raise ValueError(
            f"layout {layout.name} sends messages between GPUs but {here} ranks share {devices} here; write +stacked, "
            "as in pp2-1f1b+stacked, or choose a layout of fewer ranks"
        )


def _check_network(job: TrainJob) -> None:
    chain = job.make_network()
    trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in chain)
    if job.layout.parallelism.num_stages > trained:
        raise ValueError(
            f"layout {job.layout.name} wants p·v = {job.layout.parallelism.num_stages} stages but {job.network_name} "
            f"has {trained} layers with parameters to train, and every stage needs one; use at most that many stages"
        )


def check_writable(out: Path) -> None:
    """Raise ValueError unless files can be made in the folder ``out``, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from error
