"""`AtariEnvironment`: N Atari games stepped in C++, as one TorchRL environment.

The protocol is Machado et al. 2018 ("Revisiting the Arcade Learning Environment"): sticky actions with probability
0.25 in the place of no-op starts, the minimal action set, no end of episode at a lost life, 108,000 frames at most.
The frames are those of Mnih et al. 2015: 4 per action, the maximum of the last two, grey, 84 × 84, stacks of 4.

    reset            stack  [ 0  0  0  x₀]   a stack starts padded with zero frames
    step 1                  [ 0  0  x₀ x₁]
    step 2                  [ 0  x₀ x₁ x₂]
    step 3                  [x₀ x₁ x₂ x₃]
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import torch
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from mpdqn.randomness import keyed_seed

FRAMES_PER_ACTION = 4
STACK = 4
HEIGHT = WIDTH = 84
STICKY_ACTION_PROBABILITY = 0.25
MAX_EPISODE_FRAMES = 108_000


def find_game(name: str) -> str:
    """The ROM's name of a game: ``"ms_pacman"`` for itself, ``"MsPacman"`` and ``"ALE/MsPacman-v5"``.

    Raises:
        ValueError: for any other name; the nearest one is offered.
    """
    games: dict[str, str] = {game.replace("_", ""): game for game in roms.get_all_rom_ids()}
    bare = name.lower().removeprefix("ale/").removesuffix("-v5").replace("_", "")
    if bare in games:
        return games[bare]
    near = difflib.get_close_matches(bare, games, n=1, cutoff=0.0)[0]
    raise ValueError(f"there is no environment {name!r} among the {len(games)} Atari games; try {games[near]!r}")


def game_spec(game: str) -> tuple[tuple[int, int, int], int]:
    """The observation shape (C, H, W) and the number of actions of a ROM."""
    return (STACK, HEIGHT, WIDTH), int(_vector_env(game, 1, 1, MAX_EPISODE_FRAMES).single_action_space.n)


def _vector_env(game: str, num_envs: int, num_threads: int, max_episode_frames: int) -> Any:
    # ale-py 0.12.1 lists autoreset "Disabled" in Python but its C++ refuses it. "NextStep" is the same thing as long as
    # each ended game is reset, by mask, before the next step; `AtariEnvironment._step` sees to that.
    return AtariVectorEnv(
        game,
        num_envs,
        num_threads=num_threads,
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


class AtariEnvironment(EnvBase):  # type: ignore[misc]
    """N games of one kind; ``batch_size`` is [N].

    Keys: ``observation`` uint8 [N, 4, 84, 84], the newest frame last; ``episode`` int64 [N], how many episodes this
    environment finished or left before; ``step`` int64 [N], agent steps since the episode began; ``action`` int64 [N];
    ``reward`` float32 [N, 1], the game's own, not clipped; ``terminated`` (game over), ``truncated`` (the frame limit)
    and ``done`` (either) bool [N, 1].

    Episode k of environment e is a function of ``keyed_seed("environment", seed, e, k)`` and the actions alone: neither
    the other environments nor the processes they live in matter. The seed costs one load of the ROM, 0.1 s an episode.
    Resetting an environment that took no step since its last reset leaves it as it is.

    Args:
        game: the ROM's name, see `find_game`.
        num_envs: N.
        seed: the run's seed.
        first_index: global index of the first of the N environments.
        num_threads: threads that step the games; 0 is one for each core, at most N.
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
        if num_envs < 1 or first_index < 0:
            raise ValueError(f"num_envs is {num_envs} (at least 1) and first_index {first_index} (at least 0)")
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([num_envs]))
        self._games = _vector_env(game, num_envs, num_threads, max_episode_frames)
        self.indices = range(first_index, first_index + num_envs)
        self.observation_shape = (STACK, HEIGHT, WIDTH)
        self.num_actions = int(self._games.single_action_space.n)
        self.frames_per_action = FRAMES_PER_ACTION
        self._set_seed(seed)
        n = num_envs
        flag = Binary(1, dtype=torch.bool).expand(n, 1)
        self.observation_spec = Composite(
            observation=Bounded(0, 255, shape=(n, *self.observation_shape), dtype=torch.uint8),
            episode=Unbounded(shape=(n,), dtype=torch.int64),
            step=Unbounded(shape=(n,), dtype=torch.int64),
            shape=(n,),
        )
        self.action_spec = Categorical(self.num_actions, shape=(n,), dtype=torch.int64)
        self.reward_spec = Unbounded(shape=(n, 1), dtype=torch.float32)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,))

    def _set_seed(self, seed: int | None) -> None:
        """Start over: the next reset begins episode 0 of ``seed`` everywhere."""
        if seed is None:
            raise ValueError("an AtariEnvironment is always seeded; pass an integer, not None")
        n = len(self.indices)
        self._seed = seed
        self._episode = np.full(n, -1)
        self._step_in_episode = np.zeros(n, dtype=np.int64)
        self._over = np.ones(n, dtype=bool)

    def _reset(self, tensordict: Any = None, **_: Any) -> Any:
        asked = np.ones(len(self.indices), dtype=bool)
        if tensordict is not None and (mask := tensordict.get("_reset", None)) is not None:
            asked = mask.reshape(-1).numpy()
        fresh = (self._episode >= 0) & (self._step_in_episode == 0)
        asked = asked & ~fresh
        if asked.any():
            self._episode[asked] += 1
            self._step_in_episode[asked] = 0
            self._over[asked] = False
            seeds = [self._episode_seed(int(i)) for i in np.flatnonzero(asked)]
            self._observation = self._games.reset(seed=np.array(seeds), options={"reset_mask": asked})[0]
        over = self._column(self._over)
        return TensorDict(
            # An environment that was over and was not asked keeps its place; TorchRL merges by the mask.
            self._observed() | {"done": over, "terminated": over.clone(), "truncated": torch.zeros_like(over)},
            batch_size=self.batch_size,
            device=self.device,
        )

    def _step(self, tensordict: Any) -> Any:
        if self._over.any():
            over = [self.indices[i] for i in np.flatnonzero(self._over)]
            raise RuntimeError(f"environments {over} are over or never started; reset them before the next step")
        action = tensordict["action"].reshape(-1).numpy()
        self._observation, reward, terminated, truncated, _ = self._games.step(action)
        self._step_in_episode += 1
        self._over = terminated | truncated
        return TensorDict(
            self._observed()
            | {
                "reward": self._column(reward.astype(np.float32)),
                "done": self._column(self._over),
                "terminated": self._column(terminated),
                "truncated": self._column(truncated),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _observed(self) -> dict[str, Tensor]:
        # ale-py hands out new memory for each observation, so the tensor may share it; the counters live on.
        return {
            "observation": torch.from_numpy(self._observation),
            "episode": torch.from_numpy(self._episode.copy()),
            "step": torch.from_numpy(self._step_in_episode.copy()),
        }

    def _episode_seed(self, i: int) -> int:
        # ALE takes a C int and reads a negative one as "no new seed".
        return keyed_seed("environment", self._seed, self.indices[i], int(self._episode[i])) % 2**31

    @staticmethod
    def _column(values: Any) -> Tensor:
        return torch.from_numpy(np.array(values)).unsqueeze(-1)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Stop the threads and free the games."""
        super().close(raise_if_closed=raise_if_closed)
        self._games = None
