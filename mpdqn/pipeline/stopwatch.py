"""`Stopwatch`: when each piece of a step began and ended, without holding the device up."""

from __future__ import annotations

import time

import torch

from mpdqn.timeline import Span, Timeline


class Stopwatch:
    """Marks the spans of one rank's step.

    On the CPU a mark is a clock read. On a GPU it is an event in the stream: nothing waits until `timeline` is asked.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new step; on a GPU it records the last one's events anew, whose times are lost."""
        self._events_used = 0
        self._marks: list[tuple[str, int, int, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._origin = time.perf_counter()
        self._start = self._end = self.now()

    @property
    def origin(self) -> float:
        """The start of the step in seconds of this host's clock, which all its processes share.

        On a GPU that is when the host began, and the device's start only if it had nothing else to do.
        """
        return self._origin

    def now(self) -> float | torch.cuda.Event:
        """This moment, as `mark` takes it."""
        if not self._cuda:
            return time.perf_counter()
        if self._events_used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        event = self._events[self._events_used]
        self._events_used += 1
        event.record()
        return event

    def mark(self, kind: str, begin: float | torch.cuda.Event, stage: int = -1, microbatch: int = -1) -> None:
        """A piece of work of ``kind`` that began at ``begin`` has ended now."""
        self._marks.append((kind, stage, microbatch, begin, self.now()))

    def stop(self) -> None:
        """The step ends now."""
        self._end = self.now()

    def timeline(self) -> Timeline:
        """The last step, in seconds from its start. On a GPU this waits for the step's end."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
        spans = tuple(
            Span(self._rank, kind, stage, microbatch, self._seconds(begin), self._seconds(end))
            for kind, stage, microbatch, begin, end in self._marks
        )
        return Timeline(spans, self._seconds(self._end))

    def _seconds(self, moment: float | torch.cuda.Event) -> float:
        if isinstance(moment, torch.cuda.Event):
            assert isinstance(self._start, torch.cuda.Event)
            return float(self._start.elapsed_time(moment)) / 1000
        assert isinstance(self._start, float)
        return moment - self._start
