"""`collect`: play with an ε-greedy policy and store what happened in the virtual shards.

    observation ─ network, one shard's E environments at a time ─▶ argmax ─ named draws, ε ─▶ action
    action ─ AtariEnvironment, N = E · shards owned ─▶ frame, reward, done ─▶ each environment's own shard

All environments take a step together, everywhere: ε depends on how many steps *all* V·E environments took, so that a
process needs to know nothing of the others to play its part exactly as a single process would.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpdqn.dqn.exploration import ExplorationDraws
from mpdqn.environments import FRAMES_PER_ACTION, make_environment
from mpdqn.replay import VirtualShards

with warnings.catch_warnings():
    # torchrl 0.14.1 warns, on import, of two classes of its own which derive from a deprecated one.
    warnings.filterwarnings("ignore", r"Creating \w+ which inherits from WeightUpdaterBase", DeprecationWarning)
    from torchrl.collectors import Collector


@dataclass(frozen=True, kw_only=True)
class CollectStats:
    """What one `Actors.collect` did in this process.

    ``transitions`` agent steps in ``seconds``; ``episode_returns`` the true returns, not clipped, of the episodes that
    ended, in the order of their ends and then of their environments.
    """

    transitions: int
    episode_returns: tuple[float, ...]
    seconds: float

    @property
    def frames(self) -> int:
        """Environment frames: 4 for each transition."""
        return self.transitions * FRAMES_PER_ACTION

    @property
    def episodes(self) -> int:
        """How many episodes ended."""
        return len(self.episode_returns)

    @property
    def mean_return(self) -> float:
        """Mean true return of the episodes that ended; NaN if none did."""
        return sum(self.episode_returns) / self.episodes if self.episodes else float("nan")


class EpsilonGreedy:
    """The collector's policy: argmax of the network, or with probability ``epsilon`` a uniform action.

    The network sees one shard's E observations at a time. A matrix product of another number of rows rounds otherwise
    (1e-8 on CPU, seen), and one flipped argmax would make another game of it: the number must not depend on how many
    shards a process owns.
    """

    def __init__(
        self, network: nn.Module, draws: ExplorationDraws, *, envs_per_shard: int, device: torch.device
    ) -> None:
        self._network, self._draws, self._envs_per_shard, self._device = network, draws, envs_per_shard, device
        self.epsilon = 1.0

    def __call__(self, tensordict: Any) -> Any:
        """Add ``action`` int64 [N] to a TensorDict with ``observation``, ``episode`` and ``step``."""
        threshold, action = self._draws.draw(tensordict["episode"].numpy(), tensordict["step"].numpy())
        explores = threshold < self.epsilon
        if not explores.all():
            action = np.where(explores, action, self._greedy(tensordict["observation"]))
        tensordict["action"] = torch.from_numpy(action)
        return tensordict

    @torch.inference_mode()
    def _greedy(self, observation: Tensor) -> Any:
        parts = torch.split(observation.to(self._device), self._envs_per_shard)
        return torch.cat([self._network(part).argmax(dim=1) for part in parts]).cpu().numpy()


class Actors:
    """The environments of the owned shards, played and stored as far as asked.

    They live on between calls of `collect`, with their episodes; a context manager closes them. The network is the
    caller's own object: what is learned into it is played from the next step on.

    Args:
        network: uint8 [E, C, H, W] -> values [E, A], already on ``device``.
        environment_name: see `mpdqn.environments.make_environment`.
        shards: where transitions go. Environment e belongs to shard e // E. The owned shards must be consecutive.
        epsilon: ε, or a function of the frames that all V·E environments have played, such as `LinearEpsilon`.
        seed: the run's seed.
        device: where the network is.
        num_threads: threads that step the games; 0 is one for each core.

    Raises:
        ValueError: if the owned shards are not consecutive, or the name is no environment.
    """

    def __init__(
        self,
        network: nn.Module,
        environment_name: str,
        shards: VirtualShards,
        *,
        epsilon: float | Callable[[int], float],
        seed: int,
        device: torch.device | str = "cpu",
        num_threads: int = 0,
    ) -> None:
        owned, size = shards.owned, shards.envs_per_shard
        if not owned or owned != tuple(range(owned[0], owned[0] + len(owned))):
            raise ValueError(f"the owned shards {list(owned)} are not consecutive; actors play one run of environments")
        num_envs = len(owned) * size
        environment = make_environment(
            environment_name, num_envs=num_envs, seed=seed, first_index=owned[0] * size, num_threads=num_threads
        )
        draws = ExplorationDraws(seed=seed, environments=environment.indices, num_actions=environment.num_actions)
        self._policy = EpsilonGreedy(network, draws, envs_per_shard=size, device=torch.device(device))
        # One step at a time: the policy may change, and ε does, after any of them. The policy is trusted, as wrapping
        # would look for weights to copy.
        self._collector: Any = Collector(
            environment,
            self._policy,
            frames_per_batch=num_envs,
            total_frames=-1,
            trust_policy=True,
            track_traj_ids=False,
        )
        self._steps: Iterator[Any] = iter(self._collector)
        self._shards, self._epsilon = shards, epsilon
        self._num_envs = num_envs
        self._steps_done = 0
        self._returns = np.zeros(num_envs)
        shards.interrupt()  # these environments begin anew; what an earlier set of actors left open stays open

    def collect(self, num_transitions: int, *, progress: bool = False) -> CollectStats:
        """Play until all V·E environments together have given ``num_transitions``, rounded up to whole steps.

        This process plays and stores the part of its own shards. ``progress`` shows a bar on stderr.
        """
        start = time.perf_counter()
        steps = -(-num_transitions // self._shards.num_envs)
        finished: list[float] = []
        with tqdm(
            total=steps * self._num_envs, unit=" transitions", disable=not progress, file=sys.stderr, leave=False
        ) as bar:
            for _ in range(steps):
                finished += self._step()
                bar.update(self._num_envs)
        return CollectStats(
            transitions=steps * self._num_envs,
            episode_returns=tuple(finished),
            seconds=time.perf_counter() - start,
        )

    def _step(self) -> list[float]:
        """One step of every environment; the returns of the episodes that it ended."""
        frames = self._steps_done * self._shards.num_envs * FRAMES_PER_ACTION
        self._policy.epsilon = self._epsilon(frames) if callable(self._epsilon) else self._epsilon
        batch = next(self._steps)[:, 0]
        after = batch["next"]
        reward = after["reward"].squeeze(1)
        self._shards.append(
            observation=batch["observation"],
            action=batch["action"],
            reward=reward,
            terminated=after["terminated"].squeeze(1),
            truncated=after["truncated"].squeeze(1),
            next_observation=after["observation"],
        )
        self._steps_done += 1
        self._returns += reward.numpy()
        over = after["done"].squeeze(1).numpy()
        finished: list[float] = self._returns[over].tolist()
        self._returns[over] = 0.0
        return finished

    def close(self) -> None:
        """Stop the games; a second call does nothing."""
        self._collector.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def collect(
    network: nn.Module,
    environment_name: str,
    shards: VirtualShards,
    *,
    num_transitions: int,
    epsilon: float | Callable[[int], float],
    seed: int,
    progress: bool = False,
    device: torch.device | str = "cpu",
    num_threads: int = 0,
) -> CollectStats:
    """Play ``num_transitions``, counted over all V shards, from new environments and store them: see `Actors`.

    A second call with the same ``seed`` plays the same episodes again from their beginnings; to go on with the running
    ones, keep an `Actors`.
    """
    with Actors(
        network, environment_name, shards, epsilon=epsilon, seed=seed, device=device, num_threads=num_threads
    ) as actors:
        return actors.collect(num_transitions, progress=progress)
