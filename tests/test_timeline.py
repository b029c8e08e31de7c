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


def test_a_span_is_of_the_first_step_unless_told():
    assert Span(0, "F", 0, 0, 0.0, 1.0).step == 0
    assert Span(0, "F", 0, 0, 0.0, 1.0, 3) != Span(0, "F", 0, 0, 0.0, 1.0)


def test_a_timeline_is_moved_as_a_whole():
    later = LINE.moved(10.0, 3)
    assert later.seconds == 18.0
    assert [(s.start, s.end, s.step) for s in later.spans[:2]] == [(10.0, 11.0, 3), (14.0, 16.0, 3)]
    assert [(s.rank, s.kind, s.stage, s.microbatch) for s in later.spans] == [
        (s.rank, s.kind, s.stage, s.microbatch) for s in LINE.spans
    ]
    assert later.busy(0) == LINE.busy(0)
    assert later.moved(-10.0, 0) == LINE


def test_timelines_of_one_clock_are_joined_in_the_order_of_their_spans():
    first, second = LINE.moved(105.0, 7), LINE.moved(120.0, 8)
    whole = Timeline.joined([second, first])
    assert whole == Timeline.joined([first, second])
    assert whole.seconds == 21.5, "from the first span's start to the last one's end"
    assert [(s.start, s.rank, s.kind, s.step) for s in whole.spans] == [
        *((0.0, 0, "F", 0), (1.0, 1, "F", 0), (2.0, 1, "B", 0), (4.0, 0, "B", 0), (6.0, 0, "optimizer", 0)),
        *((15.0, 0, "F", 1), (16.0, 1, "F", 1), (17.0, 1, "B", 1), (19.0, 0, "B", 1), (21.0, 0, "optimizer", 1)),
    ]
    assert whole.busy(1) == 2 * LINE.busy(1)


def test_joined_ranks_begin_with_the_earliest():
    ranks = [Timeline((Span(rank, "F", rank, 0, 5.0 - rank, 6.0, 2),), 9.0) for rank in (0, 1)]
    whole = Timeline.joined(ranks)
    assert [(s.rank, s.start, s.end, s.step) for s in whole.spans] == [(1, 0.0, 2.0, 0), (0, 1.0, 2.0, 0)]
    assert whole.seconds == 2.0


def test_nothing_joined_is_an_empty_timeline():
    assert Timeline.joined([]) == Timeline.joined([Timeline((), 3.0)]) == Timeline((), 0.0)
