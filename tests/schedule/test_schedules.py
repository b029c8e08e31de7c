"""Every schedule: golden tables, each action once at any size, and how many micro-batches are in flight."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.schedule import SCHEDULES, Action, ActionTable, ActionTimes, action_table, check_virtual, lane_of_stages
from mpdqn.schedule.textbook import microbatch_groups

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(1, 1), (2, 2), (3, 4), (4, 3), (4, 8)]
FILLED = [name for name, schedule in SCHEDULES.items() if schedule.filled]
CASES = [
    (schedule, p, m, ahead)
    for schedule in SCHEDULES
    for p, m in SIZES
    for ahead in (["", "T"] if schedule in FILLED else [""])
]

reproducible = settings(deadline=None, derandomize=True, database=None)


def golden_file(schedule: str, p: int, m: int, ahead: str) -> Path:
    return GOLDEN / f"{schedule}-p{p}-m{m}-TD{'-ahead-' * bool(ahead)}{ahead}.csv"


@pytest.mark.parametrize(("schedule", "p", "m", "ahead"), CASES)
def test_golden_tables(schedule: str, p: int, m: int, ahead: str):
    """One line per lane. A difference is a change of the schedule: read it before the file is written anew."""
    golden = golden_file(schedule, p, m, ahead).read_text()
    table = action_table(schedule, p, m, "TD", ahead=ahead)
    assert table.to_csv() == golden
    assert ActionTable.from_csv(golden) == table


def test_every_golden_file_is_tested():
    assert sorted(GOLDEN.iterdir()) == sorted(golden_file(*case) for case in CASES)


def in_flight(table: ActionTable, lane: int) -> int:
    """The most micro-batches that a lane has between their forward and the end of their backward, over its stages."""
    flying = most = 0
    for action in table.lanes[lane]:
        flying += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        assert flying >= 0
        most = max(most, flying)
    return most


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p", range(1, 7))
@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_each_lane_does_each_action_once_and_can(schedule: str, p: int, virtual: int):
    kind = SCHEDULES[schedule]
    if virtual != kind.virtual and not kind.any_virtual:
        with pytest.raises(ValueError, match=f"{schedule} has exactly {kind.virtual} stages on each rank, not"):
            action_table(schedule, p, 2, virtual=virtual)
        return
    for m in range(1, 14):
        table = action_table(schedule, p, m, "TD", ahead="T", virtual=virtual, recompute=range(0, p, 2)).check()
        assert (len(table.lanes), table.num_stages, table.num_microbatches) == (p, p * virtual, m)
        assert table.lane_of == lane_of_stages(schedule, p, virtual)
        backward = "IW" if schedule in ("zb_h1", "zbv", "tdzb") else "B"
        for lane, actions in enumerate(table.lanes):
            wanted = Counter(
                Action(stage, letter, i)
                for stage in table.stages_of(lane)
                for letter in f"FTD{backward}{'R' if stage in range(0, p, 2) else ''}"
                for i in range(m)
            )
            assert Counter(actions) == wanted


@pytest.mark.parametrize("p", range(1, 7))
@pytest.mark.parametrize("m", range(1, 13))
def test_how_many_micro_batches_are_in_flight(p: int, m: int):
    wanted = {
        "gpipe": [m] * p,
        "1f1b": [min(m, p - lane) for lane in range(p)],
        "td1f1b": [min(m, p - lane) for lane in range(p)],
        "zb_h1": [min(m, p)] * p,
        "tdzb": [min(m, p)] * p,
    }
    for schedule, most in wanted.items():
        table = action_table(schedule, p, m, "TD", ahead="T")
        assert [in_flight(table, lane) for lane in range(p)] == most, schedule
    table = action_table("zbv", p, m, "TD")
    assert max(in_flight(table, lane) for lane in range(p)) <= 2 * p  # 1F1B's memory: chunks are half as large


@settings(reproducible, max_examples=50)
@given(st.sampled_from(FILLED), st.integers(1, 6), st.integers(1, 12), st.sampled_from(["T", "TD"]), st.data())
def test_fillers_keep_the_order_of_the_step(schedule: str, p: int, m: int, passes: str, data: st.DataObject):
    time = st.floats(0.1, 3.0)
    seconds = {kind: tuple(data.draw(time) for _ in range(p)) for kind in "FRBIWTD"}
    table = action_table(schedule, p, m, passes, ahead="T", times=ActionTimes(seconds=seconds)).check()
    assert (table.passes, table.ahead) == (passes.replace("T", ""), "T")
    assert table.without_ahead() == action_table(schedule, p, m, passes.replace("T", ""))
    for lane in table.lanes:
        ahead = [action.microbatch for action in lane if action.kind == "T"]
        assert ahead == list(range(m))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_only_filled_schedules_run_ahead(schedule: str):
    table = action_table(schedule, 3, 4, "TD", ahead="T")
    assert (table.passes, table.ahead) == (("D", "T") if schedule in FILLED else ("TD", ""))


def test_an_unknown_schedule_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown schedule '1f1'; did you mean '1f1b'"):
        action_table("1f1", 2, 2)


@pytest.mark.parametrize(("p", "m", "what"), [(0, 2, "num_lanes"), (2, 0, "num_microbatches"), (2, -1, "num_micro")])
def test_sizes_below_one_are_refused(p: int, m: int, what: str):
    with pytest.raises(ValueError, match=rf"{what}\w* is {min(p, m)} but must be at least 1"):
        action_table("gpipe", p, m)


def test_how_many_stages_a_rank_can_hold():
    check_virtual("interleaved_1f1b", 5)
    check_virtual("zbv", 2)
    with pytest.raises(ValueError, match="zbv has exactly 2 stages on each rank, not 1"):
        check_virtual("zbv", 1)
    with pytest.raises(ValueError, match="looped_bfs has at least 1 stages on each rank, not 0"):
        check_virtual("looped_bfs", 0)


def test_which_lane_holds_which_stage():
    assert lane_of_stages("1f1b", 3, 1) == (0, 1, 2)
    assert lane_of_stages("interleaved_1f1b", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert lane_of_stages("zbv", 3, 2) == (0, 1, 2, 2, 1, 0)


def test_one_chunk_interleaved_is_1f1b_and_gpipe():
    for p, m in SIZES:
        assert action_table("interleaved_1f1b", p, m, "TD", virtual=1).lanes == action_table("1f1b", p, m, "TD").lanes
        assert action_table("looped_bfs", p, m, "TD", virtual=1).lanes == action_table("gpipe", p, m, "TD").lanes


@reproducible
@given(st.integers(1, 9), st.integers(1, 40))
def test_groups_of_micro_batches(p: int, m: int):
    groups = microbatch_groups(p, m)
    assert [i for group in groups for i in group] == list(range(m))
    assert len(groups) == max(1, m // p)
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(p, m)


def test_a_forward_is_run_again_just_before_its_backward():
    assert str(action_table("1f1b", 2, 2, recompute=[0])).splitlines()[0] == "0F0 0F1 0R0 0B0 0R1 0B1"
    assert str(action_table("zb_h1", 2, 2, recompute=[1])).splitlines()[1] == "1F0 1R0 1I0 1F1 1R1 1I1 1W0 1W1"
