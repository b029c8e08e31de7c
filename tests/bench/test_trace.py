"""A trace holds what its timelines hold, in the fields that viewers of Chrome traces read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdqn.bench.trace import chrome_trace, read_trace
from mpdqn.timeline import Span, Timeline

LINE = Timeline(
    (
        Span(1, "F", 2, 0, 5.000001, 5.25),
        Span(1, "exchange", -1, -1, 5.5, 6.0),
        Span(0, "T", 0, 11, 5.0, 5.5, 1),
        Span(0, "late", -1, -1, 5.0, 6.0, 1),
    ),
    2.5,
)
TRACE = chrome_trace({"measured": LINE, "simulated": Timeline((), 0.0)})

nanoseconds = st.integers(0, 10**13)
spans = st.builds(
    lambda start, length, **fields: Span(start=start / 1e9, end=(start + length) / 1e9, **fields),
    nanoseconds,
    nanoseconds,
    rank=st.integers(0, 12),
    kind=st.sampled_from([*"FBIWRTDX", "optimizer", "exchange", "late", "Ω"]),
    stage=st.integers(-1, 12),
    microbatch=st.integers(-1, 100),
    step=st.integers(0, 3),
)
timelines = st.builds(Timeline, st.lists(spans, max_size=8).map(tuple), st.floats(0, 1e4))


def events(text: str, phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(text)["traceEvents"] if event["ph"] == phase]


def relative(timeline: Timeline) -> list[tuple[object, ...]]:
    """The spans in any order, in ns from the earliest."""
    origin = min((s.start for s in timeline.spans), default=0.0)
    return sorted(
        (s.rank, s.kind, s.stage, s.microbatch, s.step, round((s.start - origin) * 1e9), round((s.end - origin) * 1e9))
        for s in timeline.spans
    )


@given(st.dictionaries(st.text(max_size=6), timelines, max_size=3))
def test_what_is_written_is_read(written: dict[str, Timeline]) -> None:
    text = chrome_trace(written)
    read = read_trace(text)
    assert list(read) == list(written)
    for name, timeline in written.items():
        assert read[name].seconds == timeline.seconds
        assert relative(read[name]) == relative(timeline)
        assert min((s.start for s in read[name].spans), default=0.0) == 0.0
    assert chrome_trace(read) == text


def test_a_process_for_each_timeline_and_a_thread_for_each_rank() -> None:
    named = [(e["name"], e["pid"], e.get("tid"), e["args"].get("name")) for e in events(TRACE, "M")]
    assert [about for about in named if not about[0].endswith("sort_index")] == [
        ("process_name", 1, None, "measured"),
        ("thread_name", 1, 1, "rank 0"),
        ("thread_name", 1, 2, "rank 1"),
        ("process_name", 2, None, "simulated"),
    ]


def test_complete_events_are_in_microseconds_the_outer_before_the_inner() -> None:
    first = {"ph": "X", "pid": 1, "tid": 1, "name": "late", "cat": "late", "ts": 0.0, "dur": 1e6}
    assert events(TRACE, "X")[0] == first | {"args": {"stage": -1, "microbatch": -1, "step": 1}}
    assert [(e["tid"], e["name"], e["cat"], e["ts"], e["dur"]) for e in events(TRACE, "X")[1:]] == [
        (1, "0T11", "T", 0.0, 500000.0),
        (2, "2F0", "F", 1.0, 249999.0),
        (2, "exchange", "exchange", 500000.0, 500000.0),
    ]


def test_one_event_on_each_line() -> None:
    lines = TRACE.splitlines()[1:-1]
    assert [json.loads(line.rstrip(",")) for line in lines] == json.loads(TRACE)["traceEvents"]


def test_times_that_json_cannot_write_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        chrome_trace({"": Timeline((Span(0, "F", 0, 0, 0.0, float("nan")),), 1.0)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        chrome_trace({"": Timeline((), float("inf"))})


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", "not JSON"])
def test_a_file_that_is_no_trace(text: str) -> None:
    with pytest.raises(ValueError, match="no trace"):
        read_trace(text)


PROCESS: dict[str, Any] = {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "a", "seconds": 1.0}}
THREAD: dict[str, Any] = {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "rank 0"}}
SPAN: dict[str, Any] = {
    **{"ph": "X", "pid": 1, "tid": 1, "name": "0F0", "cat": "F", "ts": 0.0, "dur": 1.0},
    "args": {"stage": 0, "microbatch": 0, "step": 0},
}


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([SPAN], "event 0 .* is not known"),
        ([PROCESS, SPAN], "event 1 .* is not known"),
        ([PROCESS, PROCESS], "event 1 .* second process 'a'"),
        ([PROCESS | {"args": {"name": "a"}}], "event 0 "),
        ([PROCESS | {"args": {"name": "a", "seconds": None}}], "event 0 "),
        ([PROCESS, THREAD | {"args": {"name": "main"}}], "thread 'main' is no rank"),
        ([PROCESS, THREAD, SPAN | {"args": {}}], "event 2 .*'stage'"),
        ([PROCESS, THREAD, SPAN | {"args": None}], "event 2 "),
        ([PROCESS, THREAD, SPAN | {"args": SPAN["args"] | {"step": 0.5}}], "event 2 .*whole numbers"),
        ([PROCESS, THREAD, SPAN | {"ts": "soon"}], "event 2 "),
        ([PROCESS, THREAD, SPAN | {"dur": float("inf")}], "event 2 "),
        ([PROCESS, THREAD, SPAN | {"ph": "B"}], "event 2 .* does not write"),
        ("events", "event 0 "),
    ],
)
def test_a_trace_of_something_else(trace: object, message: str) -> None:
    assert read_trace(json.dumps({"traceEvents": [PROCESS, THREAD, SPAN]}))
    with pytest.raises(ValueError, match=message):
        read_trace(json.dumps({"traceEvents": trace}))
