"""`TrainConfig`: what `mpdqn train` trains; and the checks that come before any work."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mpdqn.dqn.agents import Agent
from mpdqn.dqn.published import Published
from mpdqn.environments import EnvironmentSpec
from mpdqn.layouts import Layout
from mpdqn.networks import set_memory_format
from mpdqn.records import Environment, Value
from mpdqn.replay.limiter import RateLimiter
from mpdqn.workload import Workload

Plain = float | int | str | bool | None


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
    """Like single@1, dp2, pp2-td1f1b/m4 or dp2xpp2-1f1b, which has 8 micro-batches (docs/layouts.md)."""
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
    """Processes that step slow simulators, for each acting rank; 0: in itself, but what MuJoCo draws in one."""
    replay_dir: Path | None = None
    """Folder in which replay is mapped to disk; default: memory."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the networks."""
    precision: Literal["float32", "tf32", "bf16", "auto"] = "auto"
    """Precision of products and convolutions; auto: on a GPU the fastest as measured, on the CPU float32."""
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
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints; 0: none by the clock."""
    checkpoint_every: int = 0
    """Frames between two checkpoints, besides; 0: none by the frames."""
    checkpoint_at_end: bool = False
    """Keep a checkpoint of the end too, to train on from with more frames. Without, the end deletes them all."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept; the newest is taken that is whole."""
    resume: Path | None = None
    """Folder of a run to go on with from its newest checkpoint (docs/checkpoints.md)."""
    trust: bool = False
    """Run the code that the folder of --resume names (my_file.py:make_network, module:Id) without naming it again."""
    seed: int = 0
    """Seed of everything."""
    out: Path = Path("results/train")
    """Folder in which the run's folder is made."""
    wandb: bool = False
    """Log to Weights & Biases, too."""
    timeout: float = 45.0
    """Seconds of silence (no heartbeat) after which a rank is lost and the run ends with an error."""
    smoke: bool = False
    """A run of seconds that exercises everything and learns nothing."""

    def resolved(self) -> TrainConfig:
        """This configuration, its paths absolute; if ``smoke`` is set, small in all that is left at its default."""
        if self.replay_dir is not None and not self.replay_dir.is_absolute():
            return replace(self, replay_dir=self.replay_dir.absolute()).resolved()
        if not self.smoke:
            return self
        small: dict[str, Any] = {"frames": 3_000, "min_replay": 256, "capacity": 2_000, "evaluation_episodes": 2}
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return replace(self, **{name: value for name, value in small.items() if name not in given})


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A checked training run: everything a rank needs.

    ``replay_dir_named`` says that the user of this run named ``replay_dir``, and not only the folder to resume.
    """

    config: TrainConfig
    workload: Workload
    layout: Layout
    cores: tuple[int, ...]
    environment: Environment
    replay_dir_named: bool = False

    @property
    def settings(self) -> Published:
        """The agent's hyperparameters, with what the command line changed."""
        return self.workload.settings

    @property
    def spec(self) -> EnvironmentSpec:
        """Shapes and actions of one of the environments."""
        return self.workload.spec

    @property
    def agent(self) -> Agent:
        """The agent, with the switches of the command line."""
        return self.workload.agent

    @property
    def num_ranks(self) -> int:
        """Learner ranks, and with workers one acting rank for each replica."""
        return self.layout.ranks + (self.layout.data if self.config.actors == "workers" else 0)

    @property
    def num_envs(self) -> int:
        """V·E."""
        return self.workload.num_envs

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

    def plays_after(self, r: int) -> bool:
        """Whether there is a round after ``r``, in this run or in one that goes on from its end."""
        return r + 1 < self.num_rounds or self.config.checkpoint_at_end

    def checkpoints_after(self, r: int) -> bool:
        """Whether a checkpoint is due after round ``r``, however long it took."""
        if r + 1 == self.num_rounds:
            return self.config.checkpoint_at_end
        return self._crosses(r, self.config.checkpoint_every)

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

    def record_settings(self) -> dict[str, Value]:
        """Everything that makes this run what it is, flat: runs that agree in it are seeds of one line."""
        incidental = (
            *("seed", "out", "timeout", "wandb", "smoke", "replay_dir", "env_workers", "log_every", "resume"),
            *("checkpoint_minutes", "checkpoint_every", "checkpoint_at_end", "keep_checkpoints", "trust"),
        )
        chosen = {name: value for name, value in asdict(self.config).items() if name not in incidental}
        settings = asdict(self.settings)
        agent, priorities, epsilon = settings.pop("agent"), settings.pop("prioritization"), settings.pop("epsilon")
        nested = {
            **{f"agent_{name}": value for name, value in agent.items()},
            **{f"priority_{name}": value for name, value in (priorities or {}).items()},
            **{f"epsilon_{name}": value for name, value in epsilon.items()},
        }
        merged = chosen | settings | nested | {"network": self.network_name, "layout": self.layout.name}
        # What has parts of its own, such as a distribution, stands as text.
        return {name: value if isinstance(value, Plain) else json.dumps(value) for name, value in merged.items()}

    @property
    def network_name(self) -> str:
        """The zoo's name or the file of the network."""
        return self.workload.network_name

    def make_network(self, *, warn: bool = False) -> nn.Sequential:
        """Return the network on the CPU in channels_last, with the same weights on every call and every rank.

        ``warn`` lets it warn of options without effect, as `check` has it do once.
        """
        network = self.workload.make_network(warn=warn)
        # One format for all: channels_last nearly halves IMPALA's step on a CPU and is what cuDNN wants; networks with
        # GroupNorm gain nothing from it. A format measured anew in every run would make runs differ by their rounding.
        set_memory_format(network, "channels_last")
        return network
