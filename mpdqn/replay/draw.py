"""`Draw`: which transitions an update takes, before any of their frames is touched."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The transitions of batch ``update``, equally many from each of ``shards``, in their order.

    ``index`` [B] int64 names each within its shard. ``probability`` [B] float64 is the true one, over all V shards: p_i
    over V times its shard's sum; None where all are the same. ``lowest`` is the smallest such probability of any
    transition that could have been drawn from these shards (infinite without priorities); the importance weights of a
    batch need the minimum over all processes.
    """

    update: int
    shards: tuple[int, ...]
    index: Tensor
    probability: Tensor | None
    lowest: float
