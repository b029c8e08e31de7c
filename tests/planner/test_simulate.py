"""`simulate` and `pace`: the closed forms, DESIGN §4's table, links by hand, several lanes on a rank, deadlocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.plan import Link
from mpdqn.planner.simulate import pace, peak_activations, simulate
from mpdqn.schedule import ActionTable, ActionTimes, action_table
from mpdqn.schedule.fillers import period
from mpdqn.timeline import Span, Timeline
from tests.schedule.tables import tables, written

reproducible = settings(deadline=None, derandomize=True, database=None)
SIZES = [(p, m) for p in range(1, 7) for m in range(1, 15)]


def working(table: ActionTable) -> float:
    """The share of a settled step in which the lanes work, with equal stages."""
    return pace(table, ActionTimes.units(table.num_stages, X=1.0)).mean_utilisation


def text(timeline: Timeline) -> str:
    """What each rank does when, by rank: ``0F0@0-1``."""
    spans = sorted(timeline.spans, key=lambda s: (s.rank, s.start))
    return " ".join(f"{s.stage}{s.kind}{s.microbatch}@{s.start:g}-{s.end:g}" for s in spans)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_wait_p_minus_1_of_m_plus_p_minus_1(schedule: str, p: int, m: int):
    """For every m, also below p (Huang et al. 2019, §2.3)."""
    assert 1 - working(action_table(schedule, p, m)) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs"])
def test_v_chunks_wait_v_times_less(schedule: str, v: int, p: int, m: int):
    """Narayanan et al. 2021, §2.2, for p | m; with groups of nearly equal size it holds for every m ≥ p."""
    assert 1 - working(action_table(schedule, p, m, virtual=v)) == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
def test_zb_h1_waits_for_one_forward_a_lane(p: int, m: int):
    """Qi et al. 2024, with F = I = W, for m ≥ p."""
    assert 1 - working(action_table("zb_h1", p, m)) == pytest.approx((p - 1) / (3 * m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
def test_zbv_waits_for_half_a_forward_a_lane(p: int, m: int):
    """From m = ⌊3p/2⌋ on, measured; the order is written for m ≥ 2p − 1, and of it some falls out below."""
    waits = 1 - working(action_table("zbv", p, m))
    formula = (p - 1) / (6 * m + p - 1)
    if m >= 3 * p // 2:
        assert waits == pytest.approx(formula, abs=1e-12)
    else:
        assert waits > formula


@reproducible
@given(
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.floats(0.01, 100),
    st.floats(0.01, 100),
)
def test_the_formula_holds_for_any_times_of_equal_stages(
    schedule: str, p: int, m: int, forward: float, backward: float
):
    times = ActionTimes.units(p, F=forward, B=backward)
    timeline = simulate(action_table(schedule, p, m), times)
    assert timeline.seconds == pytest.approx((m + p - 1) * (forward + backward), rel=1e-9)


# ---------------------------------------------------------------- Q-learning: DESIGN §4


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(
    ("p", "m", "share"), [(2, 8, 0.930), (4, 8, 0.816), (4, 16, 0.899), (8, 16, 0.792), (8, 32, 0.884)]
)
def test_three_passes_one_after_the_other(schedule: str, p: int, m: int, share: float):
    assert working(action_table(schedule, p, m, "TD")) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("schedule", "virtual", "work"), [("zb_h1", None, 3), ("interleaved_1f1b", 2, 6), ("zbv", None, 6)]
)
@pytest.mark.parametrize("passes", ["T", "TD", "TDX"])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 6), (4, 8)])
def test_passes_in_front_add_work_and_no_waiting(
    schedule: str, virtual: int | None, work: int, passes: str, p: int, m: int
):
    """A lane never drains between its passes and its forwards."""
    with_passes, without = (action_table(schedule, p, m, letters, virtual=virtual) for letters in (passes, ""))
    stages = without.num_stages // p
    times = ActionTimes.units(without.num_stages, X=1.0)
    waits = pace(without, times).step_s - m * work
    assert pace(with_passes, times).step_s == pytest.approx(m * (work + stages * len(passes)) + waits, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "p", "m", "share"),
    [
        ("td1f1b", 2, 4, 1.0),
        ("td1f1b", 2, 8, 1.0),
        ("td1f1b", 4, 8, 0.952),
        ("td1f1b", 4, 12, 1.0),
        ("td1f1b", 4, 16, 1.0),
        ("td1f1b", 8, 16, 0.941),
        ("td1f1b", 8, 32, 1.0),
        ("tdzb", 4, 8, 1.0),
        ("tdzb", 8, 16, 1.0),
    ],
)
def test_target_forwards_fill_the_bubble(schedule: str, p: int, m: int, share: float):
    """Steps in a row; more than the .909 at (4, 8) and the .870 at (8, 16) that DESIGN §4 gives."""
    assert working(action_table(schedule, p, m, "TD", ahead="T")) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 2), (3, 4), (4, 3), (4, 8), (5, 7)])
def test_filling_is_never_worse_than_passes_in_front(p: int, m: int):
    for filled, plain in [("td1f1b", "1f1b"), ("tdzb", "zb_h1")]:
        for passes in ["T", "TD"]:
            ours = working(action_table(filled, p, m, passes, ahead="T"))
            assert ours >= working(action_table(plain, p, m, passes)) - 1e-12


# ---------------------------------------------------------------- many steps


@settings(reproducible, max_examples=50)
@given(tables(max_p=4, max_m=6), st.data())
def test_pace_is_the_mean_of_many_steps(table: ActionTable, data: st.DataObject):
    time = st.floats(0.1, 3.0)
    kinds = "FRBIWTDX"
    times = ActionTimes(seconds={k: tuple(data.draw(time) for _ in range(table.num_stages)) for k in kinds})
    timeline = simulate(table, times, steps=16)
    ends = [max(s.end for s in timeline.spans if s.step == k) for k in range(16)]
    measured = pace(table, times)
    assert measured.step_s == pytest.approx((ends[15] - ends[7]) / 8, rel=1e-9)
    assert measured.step_s == pytest.approx(period(table, times), rel=1e-9)
    for rank in measured.utilisation:
        assert measured.utilisation[rank] == pytest.approx(timeline.busy(rank) / 16 / measured.step_s, rel=1e-9)
        assert measured.utilisation[rank] <= 1 + 1e-9


def test_a_step_begins_when_every_rank_has_updated_but_target_passes_need_not_wait():
    table = written("0F0 0B0\n1F0 1B0 1T0\n", ahead="T")
    table = ActionTable("custom", (table.lanes[0] + written("0T0").lanes[0], table.lanes[1]), "", "T").check()
    timeline = simulate(table, ActionTimes.units(2), steps=2, update_s=0.5)
    #  rank 0  |F0|..|..|..|B0---|T0|U|F0|   its own gradients are the last: it updates after T
    #  rank 1  |..|F0|B0---|..|..|..|T0|U|   T0 comes at 7; the update waits for the action before it
    starts = {(s.rank, s.kind, s.step): s.start for s in timeline.spans}
    assert starts[0, "T", 0] == 6.0
    assert starts[1, "T", 0] == 7.0
    assert (starts[0, "optimizer", 0], starts[1, "optimizer", 0]) == (7.0, 8.0)
    assert starts[0, "F", 1] == 7.5
    assert starts[1, "F", 1] == 8.5


def test_the_timeline_of_a_table_by_hand():
    timeline = simulate(written("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1").check(), ActionTimes.units(2))
    assert text(timeline) == "0F0@0-1 0F1@1-2 0B0@4-6 0B1@7-9 1F0@1-2 1B0@2-4 1F1@4-5 1B1@5-7"
    assert timeline.seconds == 9.0
    assert timeline.spans[0] == Span(0, "F", 0, 0, 0.0, 1.0, 0)


# ---------------------------------------------------------------- links

TWO_FORWARDS = written("0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1").check()


def test_a_message_takes_its_latency():
    timeline = simulate(TWO_FORWARDS, ActionTimes.units(2), link=Link(latency_s=0.25))
    assert (
        text(timeline)
        == "0F0@0-1 0F1@1-2 0B0@5.5-7.5 0B1@7.5-9.5 1F0@1.25-2.25 1F1@2.25-3.25 1B0@3.25-5.25 1B1@5.25-7.25"
    )


def test_two_messages_share_a_link_one_after_the_other():
    """3 s on the link for each: the second, ready at 2, leaves at 4 and comes at 7. The way back is another link."""
    timeline = simulate(TWO_FORWARDS, ActionTimes.units(2), link=Link(bytes_per_s=2.0), message_bytes=[6.0])
    assert text(timeline) == "0F0@0-1 0F1@1-2 0B0@13-15 0B1@16-18 1F0@4-5 1F1@7-8 1B0@8-10 1B1@10-12"
    both = simulate(TWO_FORWARDS, ActionTimes.units(2), link=Link(latency_s=0.5, bytes_per_s=2.0), message_bytes=[6.0])
    assert {f"{s.stage}{s.kind}{s.microbatch}": s.start for s in both.spans if s.kind == "F"}["1F1"] == 7.5


def test_each_cut_has_its_own_bytes():
    table = action_table("gpipe", 3, 1)
    timeline = simulate(table, ActionTimes.units(3), link=Link(bytes_per_s=1.0), message_bytes=[1.0, 10.0])
    assert text(timeline) == "0F0@0-1 0B0@29-31 1F0@2-3 1B0@26-28 2F0@13-14 2B0@14-16"


def test_a_message_asked_for_late_does_not_overlap_with_work():
    """Asked for in advance, F1's message travels while rank 1 does F0; else it starts when F0 has ended, at 5."""
    slow = ActionTimes(seconds={"F": (1.0, 3.0), "B": (1.0, 1.0)})
    ahead, late = (
        simulate(TWO_FORWARDS, slow, link=Link(bytes_per_s=1.0, posted_ahead=posted), message_bytes=[1.0])
        for posted in (True, False)
    )
    assert text(ahead) == "0F0@0-1 0F1@1-2 0B0@10-11 0B1@11-12 1F0@2-5 1F1@5-8 1B0@8-9 1B1@9-10"
    assert text(late) == "0F0@0-1 0F1@1-2 0B0@11-12 0B1@13-14 1F0@2-5 1F1@6-9 1B0@9-10 1B1@10-11"


def test_messages_asked_for_late_come_in_the_receivers_order():
    """Lane 0 has T ready long before F; lane 1 asks for F first, and T cannot block the link before it."""
    table = written("0T0 0F0 0B0\n1F0 1B0 1T0", ahead="T").check()
    timeline = simulate(
        table, ActionTimes.units(2), link=Link(bytes_per_s=1.0, posted_ahead=False), message_bytes=[1.0]
    )
    assert text(timeline) == "0T0@0-1 0F0@1-2 0B0@7-9 1F0@3-4 1B0@4-6 1T0@7-8"


def test_the_first_message_of_a_step_is_asked_for_after_the_update():
    table = written("0F0 0B0\n1F0 1B0").check()
    late = simulate(
        table,
        ActionTimes(seconds={"F": (0.0, 1.0), "B": (1.0, 1.0)}),
        link=Link(bytes_per_s=1.0, posted_ahead=False),
        message_bytes=[1.0],
        steps=2,
        update_s=3.0,
    )
    #  B0 on rank 0 ends at 5, both update until 8, F0's message goes from 8 to 9
    assert next(s.start for s in late.spans if (s.rank, s.kind, s.step) == (1, "F", 1)) == 9.0


@settings(reproducible, max_examples=50)
@given(tables(max_p=4, max_m=6), st.booleans())
def test_links_only_cost_time(table: ActionTable, posted_ahead: bool):
    times = ActionTimes.units(table.num_stages, X=1.0)
    free = pace(table, times)
    link = Link(latency_s=0.1, bytes_per_s=10.0, posted_ahead=posted_ahead)
    cuts = [1.0 + k for k in range(table.num_stages - 1)]
    assert pace(table, times, link=link, message_bytes=cuts).step_s >= free.step_s - 1e-9
    assert pace(table, times, link=Link(posted_ahead=posted_ahead)).step_s == pytest.approx(free.step_s, rel=1e-9)


# ---------------------------------------------------------------- several lanes on a rank


@settings(reproducible, max_examples=50)
@given(tables(max_p=4, max_m=6))
def test_on_one_rank_nothing_waits_and_messages_are_free(table: ActionTable):
    times = ActionTimes.units(table.num_stages, X=1.0)
    slow = Link(latency_s=100.0, bytes_per_s=0.01)
    one = pace(table, times, owners=[7] * table.num_stages, link=slow, message_bytes=[1.0] * table.num_stages)
    assert one.step_s == pytest.approx(sum(map(times.of, table.actions)))
    assert one.utilisation == {7: pytest.approx(1.0)}


def test_lanes_on_two_ranks():
    table = action_table("gpipe", 4, 2)
    timeline = simulate(table, ActionTimes.units(4), owners=[5, 5, 9, 9], link=Link(latency_s=10.0))
    assert {span.rank for span in timeline.spans} == {5, 9}
    assert (timeline.busy(5), timeline.busy(9)) == (12.0, 12.0)
    first = next(s for s in timeline.spans if s.rank == 9)
    assert (first.stage, first.kind, first.start) == (2, "F", 12.0)  # 0F0, 1F0, and the message


# ---------------------------------------------------------------- what cannot run


def test_a_deadlock_is_named():
    with pytest.raises(ValueError, match="the table cannot run: 0B0 waits for 0F0"):
        simulate(written("0B0 0F0"), ActionTimes.units(1))
    with pytest.raises(ValueError, match="1F0 waits for 1T0"):
        simulate(written("0T0 0F0 0B0\n1F0 1T0 1B0", passes="T"), ActionTimes.units(2))


def test_a_kind_without_times_is_named():
    with pytest.raises(KeyError, match="B"):
        simulate(TWO_FORWARDS, ActionTimes(seconds={"F": (1.0, 1.0)}))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("schedule", "peaks"), [("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1]), ("zb_h1", [4] * 4)])
def test_peak_of_what_is_kept(schedule: str, peaks: list[int]):
    table = action_table(schedule, 4, 8)
    assert [peak_activations(lane, [1.0] * 4, [0.0] * 4) for lane in table.lanes] == peaks


def test_what_is_built_again_counts_until_its_backward_ends():
    table = action_table("1f1b", 2, 4, recompute=[0])
    assert peak_activations(table.lanes[0], [1.0, 10.0], [10.0, 0.0]) == 2 * 1.0 + 10.0
    delayed = written("0F0 0F1 0R0 0I0 0R1 0I1 0W0 0W1").check()
    assert peak_activations(delayed.lanes[0], [1.0], [10.0]) == 22.0


def test_a_stage_that_builds_again_inside_its_backward_adds_for_its_length():
    whole, split = written("0F0 0T0 0F1 0B0 0B1", ahead="T"), written("0F0 0F1 0I0 0I1 0W0 0W1").check()
    assert peak_activations(whole.lanes[0], [1.0], [10.0]) == 12.0
    assert peak_activations(split.lanes[0], [1.0], [10.0]) == 12.0
    assert peak_activations(written("0F0 0T0").lanes[0], [1.0], [10.0]) == 1.0
