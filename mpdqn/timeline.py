"""`Timeline`: what each rank did and when, one type for every run.

rank 0  |T0|T1|F0|F1|....|B0|B1|        a Span is one box; the dots are the bubble,
rank 1  |..|T0|T1|F0|B0|F1|B1|..|       the share of a rank's time in which it waits
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One piece of work of one rank, from ``start`` to ``end`` in seconds on that rank's clock.

    ``kind`` is an action letter (``F``, ``B``, ``T``, ``D``) or the name of another part of the step (``exchange``,
    ``optimizer``); ``stage`` and ``microbatch`` are -1 where they do not apply.
    """

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the span in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The spans of one step; ``seconds`` is the step's whole length, waiting included."""

    spans: tuple[Span, ...]
    seconds: float

    def busy(self, rank: int, *kinds: str) -> float:
        """Seconds that ``rank`` worked, in all kinds of work or in those named."""
        return sum(s.seconds for s in self.spans if s.rank == rank and (not kinds or s.kind in kinds))
