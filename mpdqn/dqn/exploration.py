"""ε-greedy exploration whose draws are named, not drawn in turn.

Step t of episode k of environment e explores or not, and with which action, by the stream ("exploration", seed, e, k)
alone: the same in one process for all environments and in several, and whatever ε is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpdqn.randomness import keyed_seed

BLOCK = 256  # draws prepared at a time for an environment; part of the stream's definition


@dataclass(frozen=True, kw_only=True)
class LinearEpsilon:
    """ε falling linearly from ``start`` to ``end`` over the first ``decay_frames`` environment frames.

    The defaults are those of Mnih et al. 2015: 1.0 to 0.1 over 1,000,000 agent steps of 4 frames.
    """

    start: float = 1.0
    end: float = 0.1
    decay_frames: int = 4_000_000

    def __call__(self, frames: int) -> float:
        """ε when ``frames`` frames have been played."""
        done = min(1.0, frames / self.decay_frames) if self.decay_frames else 1.0
        return self.start + (self.end - self.start) * done


class ExplorationDraws:
    """The draws of several environments, prepared in blocks of 256 steps.

    Args:
        seed: the run's seed.
        environments: global index of each of the N environments.
        num_actions: A.
        action_shape: () or (D,), of one environment's action; each dimension is drawn by itself.
    """

    def __init__(
        self, *, seed: int, environments: Sequence[int], num_actions: int, action_shape: tuple[int, ...] = ()
    ) -> None:
        n = len(environments)
        self._seed, self._environments, self._num_actions = seed, tuple(environments), num_actions
        # One generator per environment would have to be stepped in order; a block can be made again from its name.
        self._block = np.full((n, 2), -1, dtype=np.int64)  # episode and number of the block that is prepared
        self._threshold = np.empty((n, BLOCK))
        self._action = np.empty((n, BLOCK, *action_shape), dtype=np.int64)

    def draw(
        self, episode: NDArray[np.int64], step: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """For each environment a uniform number in [0, 1), [N], and a uniform action, [N] or [N, D].

        ``episode`` and ``step`` [N] say where each environment is. It explores, with that action, where the number is
        below ε. Both are drawn every time, so that the stream doesn't depend on ε.
        """
        block = np.stack([episode, step // BLOCK], axis=1)
        for i in np.flatnonzero((block != self._block).any(axis=1)):
            name = keyed_seed("exploration", self._seed, self._environments[i], int(block[i, 0]))
            generator = np.random.default_rng([name, int(block[i, 1])])
            self._threshold[i] = generator.random(BLOCK)
            self._action[i] = generator.integers(self._num_actions, size=self._action.shape[1:])
            self._block[i] = block[i]
        everyone, place = np.arange(len(block)), step % BLOCK
        return self._threshold[everyone, place], self._action[everyone, place]
