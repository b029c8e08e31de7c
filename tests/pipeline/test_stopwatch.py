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
