"""`Stopwatch`: spans from the start of a step, by a clock that the test holds."""

import time

import pytest
import torch

from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.timeline import Span


def test_spans_count_from_the_start_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(3, torch.device("cpu"))
    watch.mark("F", watch.now(), 0, 0)
    now[0] = 200.0
    watch.restart()
    assert watch.timeline().spans == (), "of the last step only"
    now[0] = 201.0
    begin = watch.now()
    now[0] = 203.5
    watch.mark("B", begin, 1, 2)
    begin = watch.now()
    now[0] = 204.0
    watch.mark("optimizer", begin)
    now[0] = 205.0
    watch.stop()
    timeline = watch.timeline()
    assert timeline.spans == (Span(3, "B", 1, 2, 1.0, 3.5), Span(3, "optimizer", -1, -1, 3.5, 4.0))
    assert timeline.seconds == 5.0


class Event:
    """Stands for `torch.cuda.Event`, which needs a GPU: a clock that counts the records of all events."""

    made, clock = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock

    def elapsed_time(self, later: "Event") -> float:
        return 1000.0 * (later.at - self.at)

    def synchronize(self) -> None:
        pass


def test_events_of_a_step_serve_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each action of each step made two new ones."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(0, torch.device("cuda"))
    for steps, actions in enumerate((3, 5, 4), start=1):
        watch.restart()
        for i in range(actions):
            watch.mark("F", watch.now(), 0, i)
        watch.stop()
        assert Event.made == 2 + 2 * (3 if steps == 1 else 5), "the start, the end, and two for each action"
        timeline = watch.timeline()
        assert timeline.spans == tuple(Span(0, "F", 0, i, 2.0 * i + 1, 2.0 * i + 2) for i in range(actions))
        assert timeline.seconds == 2 * actions + 1
