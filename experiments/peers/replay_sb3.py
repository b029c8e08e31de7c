"""Stable-Baselines3's `ReplayBuffer`, built as its `DQN` builds it: both stacks of a transition, as bytes in memory.

https://github.com/DLR-RM/stable-baselines3/blob/master/stable_baselines3/common/buffers.py
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete

from experiments.peers.replay_task import ACTIONS, BATCH, ENVIRONMENTS, FRAMES, random_frames


class StableBaselinesReplay:
    """A `ReplayBuffer` of ``size`` transitions."""

    def __init__(self, size: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its imports' own deprecations
            from stable_baselines3.common.buffers import ReplayBuffer

        space = Box(0, 255, FRAMES, np.uint8)
        self._buffer = ReplayBuffer(size, space, Discrete(ACTIONS), device="cpu", n_envs=ENVIRONMENTS)
        held = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
        total = sum(getattr(self._buffer, name).nbytes for name in held)
        self.bytes_per_transition = total / (self._buffer.buffer_size * ENVIRONMENTS)
        frames = random_frames().numpy()
        zeros = np.zeros(ENVIRONMENTS, np.float32)
        self._step: tuple[Any, ...] = (
            frames,
            frames,
            np.zeros(ENVIRONMENTS, np.int64),
            zeros,
            zeros,
            [{}] * ENVIRONMENTS,
        )

    def insert(self) -> None:
        """See `Replay`."""
        self._buffer.add(*self._step)

    def sample(self) -> None:
        """See `Replay`."""
        self._buffer.sample(BATCH)
