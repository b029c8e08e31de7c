"""`Timeline`: work and bubble of each rank."""

from mpdqn.timeline import Span, Timeline

LINE = Timeline(
    (
        Span(0, "F", 0, 0, 0.0, 1.0),
        Span(0, "B", 0, 0, 4.0, 6.0),
        Span(0, "optimizer", -1, -1, 6.0, 6.5),
        Span(1, "F", 1, 0, 1.0, 2.0),
        Span(1, "B", 1, 0, 2.0, 4.0),
    ),
    8.0,
)


def test_a_span_lasts_from_its_start_to_its_end():
    assert Span(3, "T", 1, 2, 0.25, 1.0).seconds == 0.75


def test_busy_is_the_work_of_one_rank_of_all_kinds_or_of_those_named():
    assert LINE.busy(0) == 3.5
    assert LINE.busy(0, "F") == 1.0
    assert LINE.busy(0, "F", "B") == 3.0
    assert LINE.busy(1, "optimizer") == 0.0
    assert LINE.busy(2) == 0.0
