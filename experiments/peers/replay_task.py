"""What every replay of `experiments.replay` does: 32 environments step once, or 32 transitions are sampled."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FRAMES, ACTIONS = (4, 84, 84), 6
ENVIRONMENTS = 32
"""Environments that step together; one call inserts a transition of each."""

BATCH = 32
"""Transitions of one sample."""


class Memory(Protocol):
    """What frames can be written to."""

    def insert(self) -> None:
        """Store one step of `ENVIRONMENTS` environments."""


class Replay(Memory, Protocol):
    """One contender's buffer."""

    bytes_per_transition: float
    """Bytes of the buffer's tensors when it is full, over its capacity."""

    def sample(self) -> None:
        """Take `BATCH` transitions, as tensors."""


def random_frames() -> Tensor:
    """Stacked frames [32, 4, 84, 84] uint8 of all environments; what they show does not matter here."""
    return torch.randint(256, (ENVIRONMENTS, *FRAMES), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
