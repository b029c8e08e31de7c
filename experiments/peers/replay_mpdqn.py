"""mpdqn's virtual shards, as the trainer builds them, and what their memory takes at least."""

from __future__ import annotations

import torch

from experiments.peers.replay_task import BATCH, ENVIRONMENTS, FRAMES, random_frames
from mpdqn.allocator import keep_freed_memory
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.replay import VirtualShards
from mpdqn.replay.rows import frame_rows


class VirtualShardsReplay:
    """V shards in one process, each with an equal part of the environments; ``size`` transitions in all."""

    def __init__(self, size: int, num_shards: int, *, prioritized: bool) -> None:
        keep_freed_memory()
        self._shards = VirtualShards(
            observation_shape=FRAMES,
            num_shards=num_shards,
            capacity=size,
            envs_per_shard=ENVIRONMENTS // num_shards,
            seed=0,
            prioritization=Prioritization() if prioritized else None,
        )
        shards = [self._shards[v] for v in self._shards.owned]
        self.bytes_per_transition = sum(s.num_bytes for s in shards) / sum(s.capacity for s in shards)
        frames, never = random_frames(), torch.zeros(ENVIRONMENTS, dtype=torch.bool)
        self._step = {
            "observation": frames,
            "action": torch.zeros(ENVIRONMENTS, dtype=torch.int64),
            "reward": torch.ones(ENVIRONMENTS),
            "terminated": never,
            "truncated": never,
            "next_observation": frames,
        }
        self._update = 0

    def insert(self) -> None:
        """See `Replay`."""
        self._shards.append(**self._step)

    def sample(self) -> None:
        """See `Replay`."""
        self._shards.sample(BATCH, self._update)
        self._update += 1


class BareFrames:
    """Frames written to memory one after the other, with nothing beside: no replay can fill faster than that."""

    def __init__(self, size: int) -> None:
        self._rows = frame_rows((size, 1, *FRAMES[1:]), None)
        self._frames, self._next = random_frames()[:, -1:], 0

    def insert(self) -> None:
        """See `Memory`."""
        begin = self._next % (len(self._rows) - ENVIRONMENTS + 1)
        self._rows[begin : begin + ENVIRONMENTS] = self._frames
        self._next = begin + ENVIRONMENTS
