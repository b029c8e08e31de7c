"""`Actors`: the environments of some virtual shards, played by an ε-greedy policy in TorchRL's collector.

    observation ─ network, one shard's E environments at a time ─▶ argmax ─ named draws, ε ─▶ action
    action ─ environment, N = E · shards owned ─▶ frame, reward, done ─▶ Chunk ─▶ each environment's own shard

All environments take a step together, everywhere: ε depends on how many steps *all* V·E environments took, so that a
process needs to know nothing of the others to play its part exactly as a single process would.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from mpdqn.dqn.exploration import ExplorationDraws
from mpdqn.environments import make_environment
from mpdqn.progress_bar import ProgressBar
from mpdqn.replay import VirtualShards

with warnings.catch_warnings():
    # torchrl 0.14.1 warns, on import, of two classes of its own which derive from a deprecated one.
    warnings.filterwarnings("ignore", r"Creating \w+ which inherits from WeightUpdaterBase", DeprecationWarning)
    from torchrl.collectors import Collector

Greedy = Callable[[Tensor], Tensor]
"""From the network's output, values [E, A] for instance, to the best actions, int64 [E] or [E, D]."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """An episode that ended: in the global environment ``environment`` at its step ``step`` (of all environments).

    ``episode_return`` is the true one, not clipped; ``length`` counts agent steps.
    """

    step: int
    environment: int
    episode_return: float
    length: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """T steps of N environments, all tensors [T, N, …].

    ``frame`` and ``next_frame`` uint8 [T, N, c, H, W] are the newest frames of the observations before and after the
    step; a shard builds its stacks from them. ``action`` int64 [T, N] or [T, N, D], ``reward`` float32 (true),
    ``terminated`` and ``truncated`` bool. ``episodes`` ended in this chunk, by step and environment; ``restarts``
    counts the environments' workers that died and were started again so far.
    """

    frame: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_frame: Tensor
    episodes: tuple[Episode, ...] = ()
    restarts: int = 0

    @property
    def num_transitions(self) -> int:
        """T·N."""
        return self.reward.numel()

    def store(self, shards: VirtualShards) -> None:
        """Append every step to ``shards``, which own these environments."""
        for t in range(len(self.reward)):
            shards.append(
                observation=self.frame[t],
                action=self.action[t],
                reward=self.reward[t],
                terminated=self.terminated[t],
                truncated=self.truncated[t],
                next_observation=self.next_frame[t],
            )


class EpsilonGreedy:
    """The collector's policy: the network's best action, or with probability ε a uniform one.

    The network sees one shard's E observations at a time. A matrix product of another number of rows rounds otherwise
    (1e-8 on CPU, seen), and one flipped argmax would make another game of it: the number must not depend on how many
    shards a process owns. ``epsilon`` is ε at a step, counted for each environment; ``before_step`` is called with that
    step before the network is, for networks that draw noise.
    """

    def __init__(
        self,
        network: nn.Module,
        greedy: Greedy,
        draws: ExplorationDraws,
        *,
        epsilon: Callable[[int], float],
        before_step: Callable[[int], None] | None,
        envs_per_shard: int,
        device: torch.device,
    ) -> None:
        self._network, self._greedy, self._draws = network, greedy, draws
        self._epsilon, self._before_step = epsilon, before_step
        self._envs_per_shard, self._device = envs_per_shard, device
        self.step = 0

    def __call__(self, tensordict: Any) -> Any:
        """Add ``action`` int64 [N] or [N, D] to a TensorDict with ``observation``, ``episode`` and ``step``."""
        threshold, action = self._draws.draw(tensordict["episode"].numpy(), tensordict["step"].numpy())
        explores = threshold < self._epsilon(self.step)
        if not explores.all():
            if self._before_step is not None:
                self._before_step(self.step)
            explores = explores.reshape(-1, *[1] * (action.ndim - 1))
            action = np.where(explores, action, self._best(tensordict["observation"]))
        tensordict["action"] = torch.from_numpy(action)
        self.step += 1
        return tensordict

    @torch.inference_mode()
    def _best(self, observation: Tensor) -> Any:
        parts = torch.split(observation.to(self._device), self._envs_per_shard)
        return torch.cat([self._greedy(self._network(part)) for part in parts]).cpu().numpy()


class Actors:
    """The environments of the owned shards, played as far as asked; they live on with their episodes.

    A context manager closes them. The network is the caller's own object: what is learned into it is played from the
    next step on.

    Args:
        network: uint8 [E, C, H, W] -> values, already on ``device``.
        environment_name: see `mpdqn.environments.make_environment`.
        owned: numbers of the shards whose environments are played: consecutive. Environment e belongs to shard e // E.
        num_shards: V, over all processes.
        envs_per_shard: E.
        epsilon: ε, or a function of the frames that all V·E environments have played, such as `LinearEpsilon`.
        seed: the run's seed.
        greedy: the best actions of the network's output; by default those of the largest values.
        before_step: called with the number of the step before the network acts in it.
        device: where the network is.
        num_threads: threads that step the games; 0 is one for each core.
        steps: how many steps of every environment `play` makes.

    Raises:
        ValueError: if the owned shards are not consecutive, or the name is no environment.
    """

    def __init__(
        self,
        network: nn.Module,
        environment_name: str,
        *,
        owned: Sequence[int],
        num_shards: int,
        envs_per_shard: int,
        epsilon: float | Callable[[int], float],
        seed: int,
        greedy: Greedy | None = None,
        before_step: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
        num_threads: int = 0,
        workers: int = 0,
        steps: int = 1,
    ) -> None:
        if not owned or list(owned) != list(range(owned[0], owned[0] + len(owned))):
            raise ValueError(f"the owned shards {list(owned)} are not consecutive; actors play one run of environments")
        n = len(owned) * envs_per_shard
        self._environment = make_environment(
            environment_name,
            num_envs=n,
            seed=seed,
            first_index=owned[0] * envs_per_shard,
            num_threads=num_threads,
            workers=workers,
        )
        self.spec = spec = self._environment.spec
        draws = ExplorationDraws(
            seed=seed,
            environments=self._environment.indices,
            num_actions=spec.num_actions,
            action_shape=spec.action_shape,
        )
        frames_per_step = num_shards * envs_per_shard * spec.frames_per_action

        def epsilon_at(step: int) -> float:
            return epsilon(step * frames_per_step) if callable(epsilon) else epsilon

        self._policy = EpsilonGreedy(
            network,
            greedy or _largest,
            draws,
            epsilon=epsilon_at,
            before_step=before_step,
            envs_per_shard=envs_per_shard,
            device=torch.device(device),
        )
        # The policy is trusted, as wrapping would look for weights to copy.
        self._collector: Any = Collector(
            self._environment,
            self._policy,
            frames_per_batch=n * steps,
            total_frames=-1,
            trust_policy=True,
            track_traj_ids=False,
            return_same_td=True,  # chunk after chunk in the same memory
        )
        self._chunks: Iterator[Any] = iter(self._collector)
        self.steps_played, self._earlier_restarts = 0, 0
        self._returns, self._lengths = np.zeros(n), np.zeros(n, dtype=np.int64)

    def play(self) -> Chunk:
        """The next steps of every environment. The chunk's tensors are valid until the next call."""
        self._policy.step = self.steps_played  # the collector has called the policy once to see what it returns
        batch = next(self._chunks).transpose(0, 1)  # [N, T] -> [T, N]
        after = batch["next"]
        reward, terminated, truncated = (after[key].squeeze(-1) for key in ("reward", "terminated", "truncated"))
        channels = self.spec.observation_shape[0] // self.spec.stack
        return Chunk(
            frame=batch["observation"][:, :, -channels:],
            action=batch["action"],
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            next_frame=after["observation"][:, :, -channels:],
            episodes=tuple(self._ended(reward.numpy(), (terminated | truncated).numpy())),
            restarts=self.restarts,
        )

    def state(self) -> dict[str, Tensor]:
        """Where the games are, for `load_state` of actors of the same environments; each tensor by environment first.

        What `BatchedEnvironment.state` says, and of each running episode ``episode_return`` float64 [N] and ``length``
        int64 [N]. ``restarts`` int64 [N] add up to those of the workers so far. Not while `play` runs.
        """
        restarts = torch.zeros(len(self._lengths), dtype=torch.int64)
        restarts[0] = self.restarts
        return self._environment.state() | {
            "episode_return": torch.from_numpy(self._returns.copy()),
            "length": torch.from_numpy(self._lengths.copy()),
            "restarts": restarts,
        }

    @property
    def restarts(self) -> int:
        """Workers of the environments that died and were started again so far."""
        return self._earlier_restarts + self._environment.num_restarts

    def load_state(self, state: Mapping[str, Tensor], steps_played: int, begin_anew: bool = False) -> None:
        """Go on from `state`, which was taken after ``steps_played`` steps; before the first `play`.

        With ``begin_anew`` the episodes that were running are left, and the ones after them begin.

        Raises:
            ValueError: if an episode comes out differently when it is played again.
        """
        self._environment.load_state(state, begin_anew)
        self._collector.reset()  # which resets no environment that was just brought to its place
        self.steps_played, self._earlier_restarts = steps_played, int(state["restarts"].sum())
        if not begin_anew:
            self._returns, self._lengths = state["episode_return"].numpy().copy(), state["length"].numpy().copy()

    def _ended(self, reward: Any, done: Any) -> Iterator[Episode]:
        for t in range(len(reward)):
            self._returns += reward[t]
            self._lengths += 1
            for i in np.flatnonzero(done[t]):
                yield Episode(
                    step=self.steps_played,
                    environment=self._environment.indices[i],
                    episode_return=float(self._returns[i]),
                    length=int(self._lengths[i]),
                )
                self._returns[i], self._lengths[i] = 0.0, 0
            self.steps_played += 1

    def close(self) -> None:
        """Stop the games; a second call does nothing."""
        self._collector.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class CollectStats:
    """What one `collect` did in this process.

    ``transitions`` agent steps, ``frames`` environment frames, in ``seconds``; ``episode_returns`` the true returns,
    not clipped, of the episodes that ended, in the order of their ends and then of their environments.
    """

    transitions: int
    frames: int
    episode_returns: tuple[float, ...]
    seconds: float

    @property
    def episodes(self) -> int:
        """How many episodes ended."""
        return len(self.episode_returns)

    @property
    def mean_return(self) -> float:
        """Mean true return of the episodes that ended; NaN if none did."""
        return sum(self.episode_returns) / self.episodes if self.episodes else float("nan")


def collect(
    network: nn.Module,
    environment_name: str,
    shards: VirtualShards,
    *,
    num_transitions: int,
    epsilon: float | Callable[[int], float],
    seed: int,
    greedy: Greedy | None = None,
    progress: bool = False,
    device: torch.device | str = "cpu",
    num_threads: int = 0,
) -> CollectStats:
    """Play from new environments until all V·E of them together have given ``num_transitions``, and store them.

    The count is rounded up to whole steps of all environments; this process plays and stores the part of its own
    shards. ``progress`` shows a bar on stderr. A second call with the same ``seed`` plays the same episodes again from
    their beginnings; to go on with the running ones, keep an `Actors`.
    """
    start = time.perf_counter()
    shards.interrupt()  # these environments begin anew; what an earlier set of actors left open stays open
    steps = -(-num_transitions // shards.num_envs)
    num_envs = len(shards.owned) * shards.envs_per_shard
    returns: list[float] = []
    with (
        Actors(
            network,
            environment_name,
            owned=shards.owned,
            num_shards=shards.num_shards,
            envs_per_shard=shards.envs_per_shard,
            epsilon=epsilon,
            seed=seed,
            greedy=greedy,
            device=device,
            num_threads=num_threads,
        ) as actors,
        ProgressBar(total=steps * num_envs, unit=" transitions", disable=not progress, leave=False) as bar,
    ):
        for _ in range(steps):
            chunk = actors.play()
            chunk.store(shards)
            returns += [episode.episode_return for episode in chunk.episodes]
            bar.update(num_envs)
    return CollectStats(
        transitions=steps * num_envs,
        frames=steps * num_envs * actors.spec.frames_per_action,
        episode_returns=tuple(returns),
        seconds=time.perf_counter() - start,
    )


def _largest(values: Tensor) -> Tensor:
    return values.argmax(dim=-1)
