"""`MinAtarEnvironment`: N games of MinAtar (Young & Tian 2019), for quick runs: 10 × 10 cells, a plane for each object.

As published: sticky actions with probability 0.1, one frame per action and no stack, as the planes show motion by
themselves; difficulty ramps. The actions are those with an effect in the game (version 1 of its Gymnasium ids; version
0 offers all six). The cells are 0 or 255, so that a network which divides pixels by 255 sees 0 and 1. It was published
without a limit; here an episode is truncated after 10,000 steps, or a good player of Breakout would never be scored.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpdqn.environments.batched import BatchedEnvironment, Outcome
from mpdqn.environments.spec import EnvironmentSpec
from mpdqn.extras import require_extra

STICKY_ACTION_PROBABILITY = 0.1
MAX_EPISODE_STEPS = 10_000
PREFIX = "minatar-"


@dataclass(frozen=True, kw_only=True)
class MinAtarGame:
    """One game: its module's name, its planes, and its actions, of noop, left, up, right, down and fire."""

    module: str
    channels: int
    actions: tuple[int, ...]

    @property
    def name(self) -> str:
        """``"minatar-space-invaders"``, or ``"minatar-space-invaders-v0"`` with all six actions."""
        version = "-v0" if self.actions == ALL_ACTIONS and self.module != "seaquest" else ""
        return PREFIX + self.module.replace("_", "-") + version

    def spec(self) -> EnvironmentSpec:
        """What there is to know of the game.

        Raises:
            ValueError: without the extra ``minatar``.
        """
        require_extra("minatar", f"environment {self.name!r}")
        return EnvironmentSpec(
            name=self.name,
            observation_shape=(self.channels, 10, 10),
            num_actions=len(self.actions),
            stack=1,
            frames_per_action=1,
            field="games",
        )


ALL_ACTIONS = (0, 1, 2, 3, 4, 5)

GAMES = {
    game.module: game
    for game in (
        MinAtarGame(module="asterix", channels=4, actions=(0, 1, 2, 3, 4)),
        MinAtarGame(module="breakout", channels=4, actions=(0, 1, 3)),
        MinAtarGame(module="freeway", channels=7, actions=(0, 2, 4)),
        MinAtarGame(module="seaquest", channels=10, actions=ALL_ACTIONS),
        MinAtarGame(module="space_invaders", channels=6, actions=(0, 1, 3, 5)),
    )
}


def find_minatar(name: str) -> MinAtarGame | None:
    """The game of ``"minatar-breakout"``, ``"MinAtar/Breakout-v1"`` or ``-v0``; None if it is none of the five."""
    lower = name.lower()
    if not lower.startswith((PREFIX, "minatar/")):
        return None
    bare = lower[len(PREFIX) :]
    version = bare[-3:] if bare.endswith(("-v0", "-v1")) else "-v1"
    bare = bare.removesuffix(version).replace("-", "").replace("_", "")
    for game in GAMES.values():
        if game.module.replace("_", "") == bare:
            all_actions = MinAtarGame(module=game.module, channels=game.channels, actions=ALL_ACTIONS)
            return game if version == "-v1" else all_actions
    return None


class MinAtarEnvironment(BatchedEnvironment):
    """N games of one kind; see `BatchedEnvironment` for keys and shapes. Observations are [N, C, 10, 10].

    Args:
        game: which, see `find_minatar`.
        num_envs: N.
        seed: the run's seed.
        first_index: global index of the first of the N environments.
        max_episode_steps: an episode that reaches so many is truncated.

    Raises:
        ValueError: without the extra ``minatar``, or if a count is out of range.
    """

    def __init__(
        self,
        game: MinAtarGame,
        *,
        num_envs: int,
        seed: int,
        first_index: int = 0,
        max_episode_steps: int = MAX_EPISODE_STEPS,
    ) -> None:
        super().__init__(game.spec(), num_envs=num_envs, seed=seed, first_index=first_index)
        module = _load_game(game.module)
        self._games = [module.Env(ramping=True) for _ in self.indices]
        self._actions = np.array(game.actions)
        self._max_episode_steps = max_episode_steps
        self._cells = np.zeros((num_envs, 10, 10, game.channels), dtype=bool)
        self._last_action = [0] * num_envs

    def _begin(self, which: NDArray[np.int64], seeds: list[int]) -> NDArray[np.uint8]:
        for i, seed in zip(which.tolist(), seeds, strict=True):
            game = self._games[i]
            game.random = np.random.RandomState(seed)
            game.reset()
            self._last_action[i] = 0  # MinAtar's own wrapper lets it stick across a reset
            self._cells[i] = game.state()
        return self._drawn()

    def _advance(self, action: NDArray[np.int64]) -> Outcome:
        n, cells = len(self._games), self._cells
        rewards, terminated = [0] * n, [False] * n
        for i, chosen in enumerate(self._actions[action].tolist()):
            rewards[i], terminated[i] = self._act(i, chosen)
            cells[i] = self._games[i].state()
        over = np.array(terminated, dtype=bool)
        truncated = ~over & (self._step_in_episode + 1 >= self._max_episode_steps)
        return self._drawn(), np.array(rewards, dtype=np.float32), over, truncated

    def _act(self, i: int, chosen: int) -> tuple[int, bool]:
        """Game i with the action ``chosen``, unless the one before sticks; reward and whether the episode is over."""
        game, last = self._games[i], self._last_action
        if game.random.rand() >= STICKY_ACTION_PROBABILITY:
            last[i] = chosen
        reward, terminated = game.act(last[i])
        return reward, terminated

    def _play_again(self, episodes: Mapping[int, tuple[int, NDArray[np.int64]]]) -> dict[int, NDArray[np.uint8]]:
        """See `BatchedEnvironment`."""
        self._begin(np.array(list(episodes)), [seed for seed, _ in episodes.values()])
        for i, (_, actions) in episodes.items():
            for chosen in self._actions[actions].tolist():
                self._act(i, chosen)
            self._cells[i] = self._games[i].state()
        drawn = self._drawn()
        return {i: drawn[i] for i in episodes}

    def _drawn(self) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._cells.transpose(0, 3, 1, 2)).view(np.uint8) * np.uint8(255)


def _load_game(name: str) -> ModuleType:
    # The package itself imports seaborn, pandas and SciPy to draw windows: a second, 100 MB. A game needs only NumPy.
    package = importlib.util.find_spec("minatar")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "environments" / f"{name}.py"
    found: Any = importlib.util.spec_from_file_location(f"minatar.environments.{name}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
