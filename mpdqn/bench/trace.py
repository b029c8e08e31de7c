"""Timelines as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open, and back.

{"traceEvents": [                                                          a process for each timeline
  {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "measured", "seconds": 1.21}},
  {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "rank 0"}}, …      a thread for each rank
  {"ph": "X", "pid": 1, "tid": 1, "name": "0F0", "cat": "F", "ts": 0.0, "dur": 1204.5,       microseconds, to the ns
   "args": {"stage": 0, "microbatch": 0, "step": 0}}, …]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpdqn.schedule.actions import Action
from mpdqn.timeline import Span, Timeline

Event = dict[str, Any]


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """The timelines as trace-event JSON, one line for each event; each begins with its earliest span, at 0.

    Raises:
        ValueError: for a time that is not a finite number.
    """
    # Perfetto keeps process 0 and thread 0 for the kernel's idle task, so both are counted from 1.
    events = [event for pid, item in enumerate(timelines.items(), 1) for event in _events(pid, *item)]
    lines = ",\n".join(json.dumps(event, allow_nan=False) for event in events)
    return f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n'


def read_trace(text: str) -> dict[str, Timeline]:
    """The timelines that `chrome_trace` wrote, by name: times rounded to ns, spans by their start.

    Raises:
        ValueError: if ``text`` is no such trace, saying where.
    """
    try:
        events = json.loads(text)["traceEvents"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"no trace: it is not JSON with a list of traceEvents ({error!r})") from None
    names: dict[int, str] = {}
    seconds: dict[int, float] = {}
    ranks: dict[tuple[int, int], int] = {}
    spans: dict[int, list[Span]] = {}
    for number, event in enumerate(events if isinstance(events, list) else [events]):
        try:
            match event:
                case {"ph": "M", "name": "process_name", "pid": int(pid), "args": {"name": str(name)} as args}:
                    if name in names.values() or pid in names:
                        raise ValueError(f"a second process {name!r} or with pid {pid}")
                    names[pid], seconds[pid], spans[pid] = name, float(args["seconds"]), []
                case {"ph": "M", "name": "thread_name", "pid": int(pid), "tid": int(tid), "args": {"name": str(name)}}:
                    ranks[pid, tid] = _rank(name)
                case {"ph": "X", "pid": int(pid), "tid": int(tid)}:
                    spans[pid].append(_span(ranks[pid, tid], event))
                case {"ph": "M", "name": "process_sort_index" | "thread_sort_index"}:
                    pass
                case _:
                    raise ValueError("a kind of event that chrome_trace does not write")
        except KeyError as error:
            raise ValueError(f"event {number} is not of a trace of timelines: {error} is not known") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"event {number} is not of a trace of timelines: {error}") from None
    return {name: Timeline(tuple(spans[pid]), seconds[pid]) for pid, name in names.items()}


def _events(pid: int, name: str, timeline: Timeline) -> Iterator[Event]:
    """The events of one timeline: its name, the names of its ranks, its spans."""

    process = {"ph": "M", "pid": pid}
    yield process | {"name": "process_name", "args": {"name": name, "seconds": timeline.seconds}}
    yield process | {"name": "process_sort_index", "args": {"sort_index": pid}}
    for rank in sorted({span.rank for span in timeline.spans}):
        thread = process | {"tid": rank + 1}
        yield thread | {"name": "thread_name", "args": {"name": f"rank {rank}"}}
        yield thread | {"name": "thread_sort_index", "args": {"sort_index": rank}}
    origin = min((span.start for span in timeline.spans), default=0.0)

    def ns(seconds: float) -> int:
        return round((seconds - origin) * 1e9)

    # A viewer nests what it meets later, so a span comes before those inside it.
    for span in sorted(timeline.spans, key=lambda s: (ns(s.start), s.rank, -ns(s.end))):
        start, end = ns(span.start), ns(span.end)
        yield {
            **{"ph": "X", "pid": pid, "tid": span.rank + 1, "name": _text(span), "cat": span.kind},
            **{"ts": start / 1000, "dur": (end - start) / 1000},
            "args": {"stage": span.stage, "microbatch": span.microbatch, "step": span.step},
        }


def _text(span: Span) -> str:
    """``2F0`` for an action; the kind of another span."""
    letter = re.fullmatch("[A-Z]", span.kind) is not None
    return str(Action(span.stage, span.kind, span.microbatch)) if letter else span.kind


def _rank(thread: str) -> int:
    match = re.fullmatch(r"rank (\d+)", thread)
    if match is None:
        raise ValueError(f"thread {thread!r} is no rank")
    return int(match[1])


def _span(rank: int, event: Event) -> Span:
    """The span of a complete event; KeyError, TypeError or ValueError if one of its fields is none of ours."""
    args, start = event["args"], round(event["ts"] * 1000)
    end = start + round(event["dur"] * 1000)
    numbers = args["stage"], args["microbatch"]
    if not all(isinstance(value, int) for value in (*numbers, args["step"])) or not isinstance(event["cat"], str):
        raise ValueError("cat is a text, and stage, microbatch and step are whole numbers")
    return Span(rank, event["cat"], *numbers, start / 1e9, end / 1e9, args["step"])
