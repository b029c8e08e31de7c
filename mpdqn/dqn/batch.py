"""`Batch`: the transitions of one update, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B transitions, in the order of the virtual shards that gave them.

    Shapes and dtypes: ``obs`` and ``next_obs`` [B, C, H, W] uint8; ``action`` [B] int64, or [B, D] with one number in
    each of D dimensions; ``reward`` [B] float, the n-step return; ``discount`` [B] float, γⁿ or 0 after a terminal one;
    ``weight`` [B] float, importance weights; ``index`` [B] int64, the position of each transition in its shard, for the
    way back of the TD errors. ``obs`` and ``next_obs`` may be views of the same frames: write to neither.
    """

    obs: Tensor
    next_obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    weight: Tensor
    index: Tensor

    def __len__(self) -> int:
        return self.action.shape[0]

    def rows(self, start: int, stop: int) -> Self:
        """The transitions ``start`` up to ``stop``, as views."""
        return type(self)(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """This batch on ``device``, rewards, discounts and weights in ``dtype``; frames stay uint8."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return type(self)(**moved | {k: moved[k].to(dtype) for k in ("reward", "discount", "weight")})

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """One batch of all ``parts``, in their order."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})
