"""`SimulatedEnvironment`: N simulators written in Python, here or in worker processes, as one TorchRL environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpdqn.environments.batched import BatchedEnvironment, Outcome, padded, pushed
from mpdqn.environments.simulator import SimulatedKind, Simulator, SimulatorConfig, Transition
from mpdqn.environments.workers import Workers


class Crew(Protocol):
    """Whoever runs the N simulators; they are numbered from 0."""

    @property
    def num_restarts(self) -> int:
        """Workers that died and were replaced."""
        ...

    def begin(self, seeds: dict[int, int]) -> dict[int, NDArray[np.uint8]]:
        """Begin the episodes with these seeds; their first frames [C, H, W]."""
        ...

    def step(self, actions: list[Any]) -> list[Transition]:
        """Take one action in each of the N."""
        ...

    def replay(self, episodes: dict[int, tuple[int, list[Any]]]) -> dict[int, NDArray[np.uint8]]:
        """Go where each seed and its actions lead; the last frames [C, H, W]."""
        ...

    def close(self) -> None:
        """Free the simulators."""
        ...


class InProcess:
    """N simulators in this process, one after the other."""

    num_restarts = 0

    def __init__(self, config: SimulatorConfig, *, num_envs: int) -> None:
        self._simulators = [Simulator(config) for _ in range(num_envs)]

    def begin(self, seeds: dict[int, int]) -> dict[int, NDArray[np.uint8]]:
        """See `Crew`."""
        return {i: self._simulators[i].begin(seed) for i, seed in seeds.items()}

    def step(self, actions: list[Any]) -> list[Transition]:
        """See `Crew`."""
        return [simulator.step(action) for simulator, action in zip(self._simulators, actions, strict=True)]

    def replay(self, episodes: dict[int, tuple[int, list[Any]]]) -> dict[int, NDArray[np.uint8]]:
        """See `Crew`."""
        return {i: self._simulators[i].replay(*episode) for i, episode in episodes.items()}

    def close(self) -> None:
        """See `Crew`."""
        for simulator in self._simulators:
            simulator.close()
        self._simulators = []


class SimulatedEnvironment(BatchedEnvironment):
    """N simulators of one kind; see `BatchedEnvironment` for keys and shapes.

    Args:
        kind: of simulator.
        num_envs: N.
        seed: the run's seed.
        first_index: global index of the first of the N environments.
        workers: processes that run them, at most N; 0 for this one, or for one worker if the kind must be ``apart``. A
            worker that dies is replaced, its episodes are played again up to where they were, and ``num_restarts``
            counts it: the transitions are the same.

    Raises:
        ValueError: if a count is out of range, or a simulator cannot be made.
        RuntimeError: from a step or reset, if a simulator fails in its worker or its worker dies again and again.
    """

    def __init__(
        self, kind: SimulatedKind, *, num_envs: int, seed: int, first_index: int = 0, workers: int = 0
    ) -> None:
        super().__init__(kind.spec, num_envs=num_envs, seed=seed, first_index=first_index)
        self._stacks: NDArray[np.uint8] | None = None
        kind.config.variables()  # what is missing is missed here, before any worker starts
        workers = min(max(workers, int(kind.config.apart)), num_envs)
        self._crew: Crew = (
            Workers(kind.config, indices=self.indices, num_workers=workers)
            if workers
            else InProcess(kind.config, num_envs=num_envs)
        )

    def _begin(self, which: NDArray[np.int64], seeds: list[int]) -> NDArray[np.uint8]:
        frames = self._crew.begin(dict(zip(which.tolist(), seeds, strict=True)))
        self.num_restarts = self._crew.num_restarts
        first = np.stack([frames[i] for i in which.tolist()])
        self._stacks = padded(self._stacks, which, first, num_envs=len(self.indices), stack=self.spec.stack)
        return self._stacks

    def _advance(self, action: NDArray[np.int64]) -> Outcome:
        assert self._stacks is not None
        frames, reward, terminated, truncated = zip(*self._crew.step(self._choices(action)), strict=True)
        self.num_restarts = self._crew.num_restarts
        self._stacks = pushed(self._stacks, np.stack(frames))
        return self._stacks, np.array(reward, np.float32), np.array(terminated), np.array(truncated)

    def _choices(self, actions: NDArray[np.int64]) -> list[Any]:
        """Actions [K] or [K, D] as the simulators take them."""
        return list(actions) if self.spec.branches else actions.tolist()

    def _play_again(self, episodes: Mapping[int, tuple[int, NDArray[np.int64]]]) -> dict[int, NDArray[np.uint8]]:
        """See `BatchedEnvironment`."""
        return self._crew.replay({i: (seed, self._choices(actions)) for i, (seed, actions) in episodes.items()})

    def _show(self, observation: NDArray[np.uint8]) -> None:
        super()._show(observation)
        self._stacks = observation

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the workers and free the simulators."""
        super().close(raise_if_closed=raise_if_closed)
        self._crew.close()
