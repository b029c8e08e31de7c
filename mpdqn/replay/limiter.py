"""`RateLimiter`: how many updates are due, so that the replay ratio is what was asked for.

inserted      0 … min_replay      + period      + 2·period      …
updates due   0                   1             2
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RateLimiter:
    """Holds samples per insert at batch_size / ``period``, once ``min_replay`` transitions are in.

    A function of counts alone, so that every rank knows without a message what is due.

    Raises:
        ValueError: if ``period`` is below 1 or ``min_replay`` below 0.
    """

    min_replay: int
    period: int

    def __post_init__(self) -> None:
        if self.period < 1 or self.min_replay < 0:
            raise ValueError(f"period is {self.period} (at least 1) and min_replay {self.min_replay} (at least 0)")

    def updates_due(self, inserted: int) -> int:
        """The updates that a run should have made when ``inserted`` transitions are in, over all shards."""
        return max(0, inserted - self.min_replay) // self.period
