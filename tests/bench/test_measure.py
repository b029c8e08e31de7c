"""From timelines to the values of a record, against numbers worked out by hand."""

import pytest

from mpdqn.bench.layouts import Layout
from mpdqn.bench.measure import RankMeasurement, combine
from mpdqn.plan import LayerCost, Profile
from mpdqn.timeline import Span, Timeline

PROFILE = Profile(
    network="two layers",
    batch_size=8,
    device="cpu",
    threads=1,
    memory_format="contiguous",
    layers=tuple(
        LayerCost(
            name=name,
            forward_ms=1.0,
            backward_input_ms=1.0,
            backward_weight_ms=1.0,
            parameter_bytes=4,
            activation_bytes=8,
            boundary_bytes=8,
        )
        for name in ("a", "b")
    ),
)
"""Forward 2 ms, backward 4 ms."""


def layout(text: str) -> Layout:
    return Layout.parse(text, num_microbatches=4, cores=4)


def rank(step_s: float, **values: float) -> RankMeasurement:
    measured = {"compute_s": 0.5, "pipeline_s": 0.8, "exchange_s": 0.1, "optimizer_s": 0.05}
    sizes = {"bytes_sent": 0, "peak_memory_bytes": 0} | {k: int(v) for k, v in values.items() if k in ("bytes_sent",)}
    times = measured | {k: v for k, v in values.items() if k not in sizes}
    return RankMeasurement(step_s=step_s, **times, **sizes)


def test_a_rank_is_measured_from_the_timelines_of_its_steps() -> None:
    steps = [
        Timeline(
            spans=(
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
                Span(1, "B", 1, 0, 0.4, 0.6),
                Span(1, "exchange", -1, -1, 0.6, 0.7),
                Span(1, "optimizer", -1, -1, 0.7, 1.0),
            ),
            seconds=1.0,
        ),
    ]
    measured = RankMeasurement.of(1, steps, seconds=2.6, bytes_sent=2001, peak_memory_bytes=7)
    assert measured.step_s == pytest.approx(1.3)
    assert measured.compute_s == pytest.approx((0.8 + 0.4) / 2)
    assert measured.pipeline_s == pytest.approx((0.9 + 0.6) / 2), "to the end of the last action, exchange apart"
    assert measured.exchange_s == pytest.approx((0.3 + 0.1) / 2)
    assert measured.optimizer_s == pytest.approx((0.1 + 0.3) / 2)
    assert (measured.bytes_sent, measured.peak_memory_bytes) == (1000, 7)


def test_a_pipeline() -> None:
    """The bubble is what a rank does not compute until the last action of any stage; the drain is no exchange."""
    first = rank(1.0, compute_s=0.6, pipeline_s=0.8, exchange_s=0.1, bytes_sent=10)
    last = rank(1.1, compute_s=0.4, pipeline_s=0.6, exchange_s=0.25, bytes_sent=20)
    values = combine(layout("pp2-gpipe/m4"), [first, last], batch_size=22, profile=PROFILE, num_passes=2)
    assert values["step_s"] == 1.1, "the slowest rank's"
    assert values["transitions_per_s"] == pytest.approx(20.0)
    assert values["bubble_measured"] == pytest.approx(((1 - 0.6 / 0.8) + (1 - 0.4 / 0.8)) / 2)
    # m·((k + 1)·F + B) = 4·(3·2 + 4) = 40 of work, (p − 1)·(F + B) = 6 of waiting
    assert values["bubble_formula"] == pytest.approx(6 / 46)
    # The last stage ended 0.2 s before the first one did, and spent them waiting in the sum of the norm.
    assert values["exchange_s"] == pytest.approx([0.1, 0.05])
    assert values["compute_s"] == [0.6, 0.4]
    assert values["bytes_sent"] == [10, 20]
    assert values["peak_memory_bytes"] == [0, 0]


def test_two_replicas_of_a_pipeline_are_looked_at_apart() -> None:
    ranks = [
        rank(2.0, compute_s=0.5, pipeline_s=1.0, exchange_s=0.7),
        rank(2.0, compute_s=1.0, pipeline_s=0.9, exchange_s=0.05),
        rank(2.0, compute_s=0.5, pipeline_s=0.5, exchange_s=1.0),
        rank(2.0, compute_s=0.4, pipeline_s=0.4, exchange_s=1.2),
    ]
    values = combine(layout("dp2xpp2/m4"), ranks, batch_size=8, profile=PROFILE, num_passes=1)
    assert values["bubble_measured"] == pytest.approx((0.5 + 0.0 + 0.0 + 0.2) / 4)
    # Replica 0 ends at 1.0 and replica 1 at 0.5: waiting for the other replica is exchange, for the own one it is not.
    assert values["exchange_s"] == pytest.approx([0.7, 0.0, 1.0, 1.1])
    assert values["transitions_per_s"] == pytest.approx(4.0)


def test_replicas_and_stacked_stages_have_no_bubble() -> None:
    ranks = [rank(1.0, compute_s=0.1), rank(1.0, compute_s=0.2)]
    for text in ("dp2", "dp2xpp2+stacked/m4"):
        values = combine(layout(text), ranks, batch_size=8, profile=PROFILE, num_passes=2)
        assert (values["bubble_measured"], values["bubble_formula"]) == (0.0, 0.0)
        assert values["transitions_per_s"] == pytest.approx(8.0)
    values = combine(layout("pp2+stacked/m4"), ranks[:1], batch_size=8, profile=PROFILE, num_passes=2)
    assert (values["bubble_measured"], values["bubble_formula"]) == (0.0, 0.0)


def test_independent_processes_add_up() -> None:
    ranks = [rank(1.0), rank(2.0)]
    values = combine(layout("2*single@1"), ranks, batch_size=8, profile=PROFILE, num_passes=2)
    assert values["transitions_per_s"] == pytest.approx(2 * 8 / 2.0), "both, at the pace of the slower one"
    assert values["bubble_measured"] == 0.0
    assert values["exchange_s"] == [0.1, 0.1]
