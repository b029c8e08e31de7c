"""`Timeline`: what each rank did and when, one type for every run.

rank 0  |T0|T1|F0|F1|....|B0|B1|        a Span is one box; the dots are the bubble,
rank 1  |..|T0|T1|F0|B0|F1|B1|..|       the share of a rank's time in which it waits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

LATE = "late"
"""The kind of a span around passes that ran on their own at the start of an update, since they could not run ahead."""


@dataclass(frozen=True)
class Span:
    """One piece of work of one rank, from ``start`` to ``end`` in seconds on that rank's clock.

    ``kind`` is an action letter (``F``, ``B``, ``T``, ``D`` …) or the name of another part of the step (``exchange``,
    ``optimizer``); ``stage`` and ``microbatch`` are -1 where they do not apply. ``step`` counts where a timeline shows
    several.
    """

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float
    step: int = 0

    @property
    def seconds(self) -> float:
        """Length of the span in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The spans of one step or of several; ``seconds`` is their whole length, waiting included."""

    spans: tuple[Span, ...]
    seconds: float

    def busy(self, rank: int, *kinds: str) -> float:
        """Seconds that ``rank`` worked, in all kinds of work or in those named."""
        return sum(s.seconds for s in self.spans if s.rank == rank and (not kinds or s.kind in kinds))

    def moved(self, seconds: float, step: int) -> Timeline:
        """This timeline later by ``seconds``, as that of step ``step``."""
        spans = tuple(replace(s, start=s.start + seconds, end=s.end + seconds, step=step) for s in self.spans)
        return Timeline(spans, self.seconds + seconds)

    @classmethod
    def joined(cls, timelines: Sequence[Timeline]) -> Self:
        """Timelines of one clock as one, which begins with the first span of all; its steps count from 0."""
        spans = [span for timeline in timelines for span in timeline.spans]
        start, step = min((s.start for s in spans), default=0.0), min((s.step for s in spans), default=0)
        moved = (replace(s, start=s.start - start, end=s.end - start, step=s.step - step) for s in spans)
        ordered = tuple(sorted(moved, key=lambda s: (s.start, s.rank)))
        return cls(ordered, max((s.end for s in ordered), default=0.0))
