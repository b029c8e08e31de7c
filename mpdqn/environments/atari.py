"""`AtariEnvironment`: N Atari games stepped in C++, as one TorchRL environment.

The protocol is Machado et al. 2018 ("Revisiting the Arcade Learning Environment"): sticky actions with probability
0.25 in the place of no-op starts, the minimal action set, no end of episode at a lost life, 108,000 frames at most.
The frames are those of Mnih et al. 2015: 4 per action, the maximum of the last two, grey, 84 × 84, stacks of 4.

ALE takes a seed only while it loads a ROM, which costs 0.1 s of computing (75 % of it for a table of blended colours
that nobody looks at): a quarter of what a short episode's steps cost. Each game is therefore a C++ environment of its
own, and the next episode of each, whose seed is known, is loaded beside the running one, whose place it then takes:

    game e    ├── episode k ── step 128 ────────────────────────┤├── episode k+1, loaded already ──
    reserve                        └─ load, seed (e, k+1) ─ wait ┘└─ … the old game is the next reserve
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from numpy.typing import NDArray

from mpdqn.environments.atari_games import FRAMES_PER_ACTION
from mpdqn.environments.batched import BatchedEnvironment, Outcome
from mpdqn.environments.spec import EnvironmentSpec

STACK = 4
HEIGHT = WIDTH = 84
STICKY_ACTION_PROBABILITY = 0.25
MAX_EPISODE_FRAMES = 108_000
RESERVE_AFTER = 128
"""The step of an episode at which the next is loaded: short collections and episodes never pay for it."""


def game_spec(game: str) -> EnvironmentSpec:
    """What there is to know of a ROM, which is loaded for it (0.1 s)."""
    return EnvironmentSpec(
        name=game,
        observation_shape=(STACK, HEIGHT, WIDTH),
        num_actions=int(_vector_env(game, MAX_EPISODE_FRAMES).single_action_space.n),
        stack=STACK,
        frames_per_action=FRAMES_PER_ACTION,
        field="games",
    )


def _vector_env(game: str, max_episode_frames: int) -> Any:
    # ale-py 0.12.1 lists autoreset "Disabled" in Python but its C++ refuses it. "NextStep" is the same thing as long as
    # an ended game is reset before the next step; `BatchedEnvironment._step` sees to that.
    return AtariVectorEnv(
        game,
        1,
        num_threads=1,
        max_num_frames_per_episode=max_episode_frames,
        repeat_action_probability=STICKY_ACTION_PROBABILITY,
        autoreset_mode="NextStep",
        img_height=HEIGHT,
        img_width=WIDTH,
        stack_num=STACK,
        frameskip=FRAMES_PER_ACTION,
        maxpool=True,
        noop_max=0,
        episodic_life=False,
        reward_clipping=False,
        use_fire_reset=False,
    )


class AtariEnvironment(BatchedEnvironment):
    """N games of one kind; see `BatchedEnvironment` for keys and shapes.

    Args:
        game: the ROM's name, see `atari_games.find_game`.
        num_envs: N.
        seed: the run's seed.
        first_index: global index of the first of the N environments.
        num_threads: games that are stepped at a time; 0 leaves it to the cores that this process may use.
        max_episode_frames: the frame limit; an episode that reaches it is truncated.

    Raises:
        ValueError: if a count is out of range.
    """

    def __init__(
        self,
        game: str,
        *,
        num_envs: int,
        seed: int,
        first_index: int = 0,
        num_threads: int = 0,
        max_episode_frames: int = MAX_EPISODE_FRAMES,
    ) -> None:
        self._make: Callable[[], Any] = lambda: _vector_env(game, max_episode_frames)
        self._reserves: dict[int, Future[tuple[Any, Any]]] = {}
        self._spare: list[Any] = []
        super().__init__(game_spec(game), num_envs=num_envs, seed=seed, first_index=first_index)
        self._games = [self._make() for _ in self.indices]
        cores = num_threads or len(os.sched_getaffinity(0))
        # All at once, or the cores would wait for one that takes longer: games are received in order.
        self._at_once = num_threads or num_envs
        self._loaders = ThreadPoolExecutor(min(num_envs, cores), "mpdqn-load")
        self._reserve_loader = ThreadPoolExecutor(1, "mpdqn-reserve")

    def _begin(self, which: NDArray[np.int64], seeds: list[int]) -> NDArray[np.uint8]:
        stacks = np.zeros((len(self.indices), *self.observation_shape), np.uint8)
        if len(which) < len(stacks):
            stacks[:] = self._observation
        loads = {}
        for i, seed in zip(which.tolist(), seeds, strict=True):
            if i in self._reserves:
                self._spare.append(self._games[i])
                loads[i] = self._reserves.pop(i)
            else:
                loads[i] = self._loaders.submit(_load, self._games[i], seed)
        for i, load in loads.items():
            self._games[i], stacks[i] = load.result()
        return stacks

    def _advance(self, action: NDArray[np.int64]) -> Outcome:
        n = len(self._games)
        stacks = np.empty((n, *self.observation_shape), np.uint8)
        reward, terminated, truncated = np.empty(n, np.float32), np.empty(n, bool), np.empty(n, bool)
        for i in range(n + self._at_once):
            if i < n:
                self._games[i].send(action[i : i + 1])
            if (j := i - self._at_once) >= 0:
                (stacks[j],), (reward[j],), (terminated[j],), (truncated[j],), _ = self._games[j].recv()
        for i in np.flatnonzero(self._step_in_episode == RESERVE_AFTER).tolist():
            self._begin_reserve(i)
        return stacks, reward, terminated, truncated

    def _play_again(self, episodes: Mapping[int, tuple[int, NDArray[np.int64]]]) -> dict[int, NDArray[np.uint8]]:
        """See `BatchedEnvironment`; the games one beside the other."""

        def play(i: int, seed: int, actions: NDArray[np.int64]) -> NDArray[np.uint8]:
            game, stack = _load(self._games[i], seed)
            for k in range(len(actions)):
                game.send(actions[k : k + 1])
                (stack,), *_ = game.recv()
            newest: NDArray[np.uint8] = np.array(stack[-1:])
            return newest

        frames = {i: self._loaders.submit(play, i, *episode) for i, episode in episodes.items()}
        return {i: frame.result() for i, frame in frames.items()}

    def _show(self, observation: NDArray[np.uint8]) -> None:
        super()._show(observation)
        for i in np.flatnonzero(self._step_in_episode > RESERVE_AFTER).tolist():
            if i not in self._reserves:
                self._begin_reserve(i)

    def _begin_reserve(self, i: int) -> None:
        seed = self._episode_seed(i, int(self._episode[i]) + 1)
        self._reserves[i] = self._reserve_loader.submit(self._load_reserve, seed)

    def _load_reserve(self, seed: int) -> tuple[Any, Any]:
        return _load(self._spare.pop() if self._spare else self._make(), seed)

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        for load in self._reserves.values():  # of episodes of the old seed
            self._spare.append(load.result()[0])
        self._reserves.clear()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Stop the threads and free the games."""
        super().close(raise_if_closed=raise_if_closed)
        self._loaders.shutdown()
        self._reserve_loader.shutdown(cancel_futures=True)
        self._games, self._spare = [], []
        self._reserves = {}


def _load(game: Any, seed: int) -> tuple[Any, Any]:
    """Load a game's ROM with a new seed; the game and its first stack [4, 84, 84]. Python's lock is free meanwhile."""
    return game, game.reset(seed=np.array([seed]))[0][0]
