"""`gather`: transitions rebuilt from rows, those of several shards straight into one batch.

The frames of a transition are read once. With one-step returns obs and next_obs differ by one frame, and both are views
of the same stack + 1:

    n = 1      x₋₃ x₋₂ x₋₁ x₀ x₁            n > 1      x₋₃ x₋₂ x₋₁ x₀ | xₖ₋₃ xₖ₋₂ xₖ₋₁ xₖ      k ≤ n steps were taken
    obs        └─────────────┘              obs        └─────────────┘
    next_obs       └─────────────┘          next_obs                    └─────────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdqn.dqn.batch import Batch

if TYPE_CHECKING:
    from mpdqn.replay.shard import Shard


def gather(parts: Sequence[tuple[Shard, NDArray[np.int64]]], weight: Tensor | None = None) -> Batch:
    """The transitions that each part's indices [B_s] name in its shard, joined; all shards are built alike.

    ``weight`` [B] float32 are the importance weights, 1 if None. ``obs`` and ``next_obs`` may share memory: write to
    neither.
    """
    first = parts[0][0]
    stack, n = first.stack, first.n_step
    count = sum(len(index) for _, index in parts)
    step, action = np.empty(count, np.int32), np.empty((count, *first.action_shape), np.int64)
    reward = np.empty((count, n), np.float32)
    terminated, truncated = np.empty((count, n), np.bool_), np.empty((count, n), np.bool_)
    begin = 0
    for shard, index in parts:
        part = slice(begin, begin := begin + len(index))
        shard.read_steps(index, step[part], action[part], reward[part], terminated[part], truncated[part])

    done = (terminated | truncated).astype(np.int64)
    taken = done.cumsum(1) - done == 0  # [B, n]: step i was taken, as the episode did not end before it
    num_steps = taken.sum(1)
    clipped = np.clip(reward, -1.0, 1.0) if first.clip_rewards else reward
    returns = np.zeros(count)
    for i in range(n):
        returns += first.discounts[i] * clipped[:, i].astype(np.float64) * taken[:, i]
    discount = first.discounts[num_steps] * ~(terminated & taken).any(1)

    back = np.arange(1 - stack, 1)
    if n == 1:
        offsets, next_at = np.broadcast_to(np.arange(1 - stack, 2), (count, stack + 1)), 1
    else:
        offsets = np.concatenate([np.broadcast_to(back, (count, stack)), num_steps[:, None] + back], axis=1)
        next_at = stack
    frames = torch.empty(count, offsets.shape[1], *first.frame_shape, dtype=torch.uint8)
    pixels = frames.numpy()
    begin = 0
    for shard, index in parts:
        part = slice(begin, begin := begin + len(index))
        shard.read_frames(index, offsets[part], pixels[part])
    before = step[:, None] + offsets < 0  # frames of before the episode
    if before.any():
        pixels[before] = 0

    stacks = frames.flatten(1, 2)
    channels = stack * first.frame_shape[0]
    skip = next_at * first.frame_shape[0]
    return Batch(
        obs=stacks[:, :channels],
        next_obs=stacks[:, skip : skip + channels],
        action=torch.from_numpy(action),
        reward=torch.from_numpy(returns.astype(np.float32)),
        discount=torch.from_numpy(discount.astype(np.float32)),
        weight=torch.ones(count) if weight is None else weight,
        index=torch.from_numpy(np.concatenate([index for _, index in parts])),
    )
