"""`gather`: transitions rebuilt from rows, those of several shards straight into one batch.

The frames of a transition are read once. With one-step returns obs and next_obs differ by one frame, and both are views
of the same stack + 1:

    n = 1      x₋₃ x₋₂ x₋₁ x₀ x₁            n > 1      x₋₃ x₋₂ x₋₁ x₀ | xₖ₋₃ xₖ₋₂ xₖ₋₁ xₖ      k ≤ n steps were taken
    obs        └─────────────┘              obs        └─────────────┘
    next_obs       └─────────────┘          next_obs                    └─────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
    like = parts[0][0]
    stack, n, channels = like.stack, like.n_step, like.frame_shape[0]
    index = np.concatenate([part for _, part in parts])
    count = len(index)
    position, env = np.divmod(index, like.num_envs)
    ring, at = (env * like.length)[:, None], position[:, None]

    steps = np.empty((count, n), like.records.dtype)
    rows = ring + (at + np.arange(n)) % like.length
    for shard, part in _slices(parts):
        np.take(shard.records, rows[part], 0, steps[part], mode="clip")  # "raise" would go through a copy
    returns, discount, num_steps = _returns(like, steps)

    if num_steps is None:
        offsets, skip = np.arange(1 - stack, 2)[None], 1
    else:
        back = np.broadcast_to(np.arange(1 - stack, 1), (count, stack))
        offsets, skip = np.concatenate([back, num_steps[:, None] + back], axis=1), stack
    frames = torch.empty(count, offsets.shape[1], *like.frame_shape, dtype=torch.uint8)
    rows = ring + (at + offsets) % like.length
    for shard, part in _slices(parts):  # by torch's threads: frames that lie far apart are waited for together
        wanted = torch.from_numpy(rows[part].reshape(-1))
        torch.index_select(torch.from_numpy(shard.frames), 0, wanted, out=frames[part].flatten(0, 1))
    before = steps["step"][:, :1] + offsets < 0  # frames of before the episode
    if before.any():
        frames.numpy()[before] = 0

    stacks = frames.flatten(1, 2)
    return Batch(
        obs=stacks[:, : stack * channels],
        next_obs=stacks[:, skip * channels : (skip + stack) * channels],
        action=torch.from_numpy(steps["action"][:, 0].copy()),
        reward=torch.from_numpy(returns.astype(np.float32)),
        discount=torch.from_numpy(discount.astype(np.float32)),
        weight=torch.from_numpy(np.ones(count, np.float32)) if weight is None else weight,
        index=torch.from_numpy(index),
    )


def _returns(
    like: Shard, steps: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64] | None]:
    """Returns and discounts [B] of records [B, n], and how many of the n steps were taken [B]; None if all were."""
    reward, terminated = steps["reward"].astype(np.float64), steps["terminated"]
    if like.clip_rewards:
        np.minimum(np.maximum(reward, -1.0, out=reward), 1.0, out=reward)
    if like.n_step == 1:
        return like.discounts[0] * reward[:, 0], like.discounts[1] * ~terminated[:, 0], None
    done = terminated | steps["truncated"]
    taken = done.cumsum(1) - done == 0  # step i was taken, as the episode did not end before it
    num_steps = taken.sum(1)
    returns = np.zeros(len(steps))
    for i in range(like.n_step):
        returns += like.discounts[i] * reward[:, i] * taken[:, i]
    return returns, like.discounts[num_steps] * ~(terminated & taken).any(1), num_steps


def index_of(parts: Sequence[tuple[Shard, NDArray[np.int64]]]) -> NDArray[np.int64]:
    """The names of the transitions whose rows [B_s] in each shard are given, joined; all shards are built alike.

    A name is position · E + environment: unlike a row's number, it is never given to another transition.
    """
    like = parts[0][0]
    env, place = np.divmod(np.concatenate([rows for _, rows in parts]), like.length)
    newest = np.concatenate([shard.written.take(env[part]) for shard, part in _slices(parts)]) - 1
    index: NDArray[np.int64] = (newest - (newest - place) % like.length) * like.num_envs + env
    return index


def _slices(parts: Sequence[tuple[Shard, NDArray[np.int64]]]) -> Iterator[tuple[Shard, slice]]:
    """Where each shard's part lies in what is joined."""
    begin = 0
    for shard, part in parts:
        yield shard, slice(begin, begin := begin + len(part))
