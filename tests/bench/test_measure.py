"""From timelines to the values of a record, against numbers worked out by hand."""

import pytest

from mpdqn.arrangement import Arrangement
from mpdqn.bench.measure import RankMeasurement, combine
from mpdqn.timeline import LATE, Span, Timeline
from tests.test_arrangement import arranged


def arrangement(text: str) -> Arrangement:
    """Of two equal layers, for four micro-batches."""
    return arranged(f"{text}/m4")


def rank(step_s: float, **values: float) -> RankMeasurement:
    measured = {"compute_s": 0.5, "exchange_s": 0.1, "optimizer_s": 0.05}
    sizes = {"bytes_sent": 0, "peak_memory_bytes": 0} | {k: int(v) for k, v in values.items() if k in ("bytes_sent",)}
    times = measured | {k: v for k, v in values.items() if k not in sizes}
    return RankMeasurement(step_s=step_s, **times, **sizes)


def test_a_rank_is_measured_from_the_timelines_of_its_steps() -> None:
    steps = [
        Timeline(
            spans=(
                Span(1, LATE, -1, -1, 0.0, 0.25),
                Span(1, "T", 1, 0, 0.0, 0.2),
                Span(1, "F", 1, 0, 0.3, 0.5),
                Span(1, "B", 1, 0, 0.5, 0.9),
                Span(1, "exchange", -1, -1, 0.9, 1.2),
                Span(1, "optimizer", -1, -1, 1.2, 1.3),
            ),
            seconds=1.4,
        ),
        Timeline(
            spans=(
                Span(1, "D", 1, 0, 0.1, 0.2),
                Span(1, "F", 1, 0, 0.2, 0.3),
                Span(1, "R", 1, 0, 0.3, 0.35),
                Span(1, "I", 1, 0, 0.4, 0.5),
                Span(1, "W", 1, 0, 0.5, 0.6),
                Span(1, "exchange", -1, -1, 0.6, 0.7),
                Span(1, "optimizer", -1, -1, 0.7, 1.0),
            ),
            seconds=1.0,
        ),
    ]
    measured = RankMeasurement.of(1, steps, seconds=2.6, bytes_sent=2001, peak_memory_bytes=7)
    assert measured.step_s == pytest.approx(1.3)
    assert measured.compute_s == pytest.approx((0.8 + 0.45) / 2), "every action once; late ones lie within their span"
    assert measured.exchange_s == pytest.approx((0.3 + 0.1) / 2)
    assert measured.optimizer_s == pytest.approx((0.1 + 0.3) / 2)
    assert (measured.bytes_sent, measured.peak_memory_bytes) == (1000, 7)


def test_a_rank_without_a_span_worked_for_no_time() -> None:
    measured = RankMeasurement.of(0, [Timeline((), 1.0)], seconds=1.0, bytes_sent=0, peak_memory_bytes=0)
    assert (measured.compute_s, measured.exchange_s, measured.optimizer_s) == (0.0, 0.0, 0.0)


def test_a_pipeline() -> None:
    """The bubble is what a rank does not compute of a step; who waits least for the exchange says what that costs."""
    first = rank(1.0, compute_s=0.6, exchange_s=0.1, bytes_sent=10)
    last = rank(1.1, compute_s=0.4, exchange_s=0.25, optimizer_s=0.1, bytes_sent=20)
    values = combine(arrangement("pp2-gpipe"), [first, last], batch_size=22)
    assert values["step_s"] == 1.1, "the slowest rank's"
    assert values["transitions_per_s"] == pytest.approx(20.0)
    # Of the step, 0.1 s are the exchange on both ranks; the last stage's other 0.15 s were waiting for the first.
    assert values["bubble_measured"] == pytest.approx(((1 - 0.6 / 0.95) + (1 - 0.4 / 0.9)) / 2)
    # m·((k + 1)·F + B) = 4·(3·1 + 2) = 20 of work, (p − 1)·(F + B) = 3 of waiting
    assert values["bubble_simulated"] == pytest.approx(3 / 23)
    assert values["exchange_s"] == pytest.approx([0.1, 0.1])
    assert values["compute_s"] == [0.6, 0.4]
    assert values["bytes_sent"] == [10, 20]
    assert values["peak_memory_bytes"] == [0, 0]


def test_two_replicas_of_a_pipeline_are_looked_at_apart() -> None:
    ranks = [
        rank(2.0, compute_s=0.5, exchange_s=0.75),
        rank(2.0, compute_s=1.95, exchange_s=0.05),
        rank(2.0, compute_s=0.5, exchange_s=1.0),
        rank(2.0, compute_s=0.4, exchange_s=0.95),
    ]
    values = combine(arrangement("dp2xpp2"), ranks, batch_size=8)
    # 2 − 0.05 − 0.05 = 1.9 s in replica 0, 2 − 0.95 − 0.05 = 1 s in replica 1; no rank waits less than not at all.
    assert values["bubble_measured"] == pytest.approx(((1 - 0.5 / 1.9) + 0.0 + 0.5 + 0.6) / 4)
    assert values["exchange_s"] == pytest.approx([0.05, 0.05, 0.95, 0.95])
    assert values["transitions_per_s"] == pytest.approx(4.0)


def test_replicas_and_stacked_stages_have_no_bubble() -> None:
    ranks = [rank(1.0, compute_s=0.1), rank(1.0, compute_s=0.2, exchange_s=0.3)]
    for text in ("dp2", "dp2xpp2+stacked"):
        values = combine(arrangement(text), ranks, batch_size=8)
        assert (values["bubble_measured"], values["bubble_simulated"]) == (0.0, 0.0)
        assert values["transitions_per_s"] == pytest.approx(8.0)
        assert values["exchange_s"] == [0.1, 0.3], "waiting for the other replica is exchange"
    values = combine(arrangement("pp2+stacked"), ranks[:1], batch_size=8)
    assert (values["bubble_measured"], values["bubble_simulated"]) == (0.0, 0.0)


def test_independent_processes_add_up() -> None:
    ranks = [rank(1.0), rank(2.0, exchange_s=0.0)]
    values = combine(arrangement("2*single@1"), ranks, batch_size=8)
    assert values["transitions_per_s"] == pytest.approx(2 * 8 / 2.0), "both, at the pace of the slower one"
    assert values["bubble_measured"] == 0.0
    assert values["exchange_s"] == [0.1, 0.0]
