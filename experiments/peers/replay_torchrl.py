"""TorchRL's replay buffer in the manner of its shipped ``sota-implementations/dqn/dqn_atari.py``.

https://github.com/pytorch/rl/blob/main/sota-implementations/dqn/dqn_atari.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)

from experiments.peers.replay_task import ACTIONS, BATCH, ENVIRONMENTS, random_frames


class TorchRLReplay:
    """A `TensorDictReplayBuffer` of ``size`` transitions, each with both of its stacks.

    As published: the frames are floats (`ToTensorImage`, `VecNorm`) in a memory-mapped storage under ``scratch``, and a
    transform moves a sample to the device. ``tuned``: bytes in memory, and no transform.
    """

    def __init__(self, size: int, scratch: Path, *, tuned: bool, prioritized: bool) -> None:
        storage = LazyTensorStorage(size) if tuned else LazyMemmapStorage(size, scratch_dir=scratch)
        if prioritized:
            self._buffer: Any = TensorDictPrioritizedReplayBuffer(
                alpha=0.5, beta=0.4, storage=storage, batch_size=BATCH, priority_key="td_error"
            )
        else:
            self._buffer = TensorDictReplayBuffer(storage=storage, batch_size=BATCH)
        if not tuned:
            self._buffer.append_transform(lambda data: data.to("cpu"))
        frames = random_frames() if tuned else random_frames().float().div(255)
        never, one = torch.zeros(ENVIRONMENTS, 1, dtype=torch.bool), torch.ones(ENVIRONMENTS, 1)
        ends = {"done": never, "terminated": never, "truncated": never, "end-of-life": never}
        self._step = TensorDict(
            {
                "pixels": frames,
                "action": torch.zeros(ENVIRONMENTS, dtype=torch.int64),
                "action_value": torch.zeros(ENVIRONMENTS, ACTIONS),
                "chosen_action_value": one,
                **ends,
                "next": {"pixels": frames, "reward": one, **ends},
            },
            batch_size=[ENVIRONMENTS],
        )
        self.bytes_per_transition = self._step.bytes() / ENVIRONMENTS

    def insert(self) -> None:
        """See `Replay`."""
        self._buffer.extend(self._step)

    def sample(self) -> None:
        """See `Replay`."""
        self._buffer.sample()
