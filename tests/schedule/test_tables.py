"""`ActionTable`: what an action waits for, what a table is refused for, its texts, and the orders of ranks."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.schedule import Action, ActionTable, action_table
from mpdqn.schedule.times import play
from tests.schedule.tables import tables, written

reproducible = settings(deadline=None, derandomize=True, database=None)


def names(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))


WHOLE = written(
    "0T0 0D0 0F0 0B0\n1T0 1D0 1F0 1B0\n2T0 2D0 2F0 2B0",
    passes="TD",
)
SPLIT = written(
    "0T0 0F0 0X0 0R0 0I0 0W0\n1T0 1F0 1B0 1X0\n2T0 2F0 2R0 2I0 2X0 2W0",
    passes="T",
    ahead="X",
)


@pytest.mark.parametrize(
    ("table", "action", "needed"),
    [
        (WHOLE, "0F0", ""),
        (WHOLE, "1F0", "0F0"),
        (WHOLE, "2F0", "1F0 2T0 2D0"),  # the loss needs the values of the passes
        (WHOLE, "0T0", ""),
        (WHOLE, "2D0", "1D0"),
        (WHOLE, "2B0", "2F0"),
        (WHOLE, "1B0", "1F0 2B0"),
        (WHOLE, "0B0", "0F0 1B0"),
        (SPLIT, "0R0", "0F0"),
        (SPLIT, "0I0", "0R0 1B0"),
        (SPLIT, "0W0", "0I0"),
        (SPLIT, "1B0", "1F0 2I0"),
        (SPLIT, "2F0", "1F0"),  # where the forward is run again, the loss is taken then
        (SPLIT, "2R0", "2F0 2T0"),
        (SPLIT, "2I0", "2R0"),
        (SPLIT, "0X0", ""),
        (SPLIT, "2X0", "1X0"),
    ],
)
def test_what_an_action_waits_for(table: ActionTable, action: str, needed: str):
    table.check()
    assert names(table.dependencies(Action.parse(action))) == needed
    assert names(table.needs[Action.parse(action)]) == needed


@pytest.mark.parametrize(
    ("table", "action", "to"),
    [
        (WHOLE, "0F0", "1F0"),
        (WHOLE, "2F0", "None"),
        (WHOLE, "0T0", "1T0"),
        (WHOLE, "2B0", "1B0"),
        (WHOLE, "0B0", "None"),
        (SPLIT, "2I0", "1B0"),
        (SPLIT, "1B0", "0I0"),
        (SPLIT, "2W0", "None"),
        (SPLIT, "0R0", "None"),
        (SPLIT, "1X0", "2X0"),
    ],
)
def test_where_a_result_goes(table: ActionTable, action: str, to: str):
    assert str(table.result_goes_to(Action.parse(action))) == to


@reproducible
@given(tables())
def test_results_go_where_they_are_waited_for(table: ActionTable):
    for action in table.actions:
        to = table.result_goes_to(action)
        assert to is None or action in table.needs[to]
        for other in table.needs[action]:
            assert other.stage == action.stage or table.result_goes_to(other) == action


def test_the_loss_is_taken_at_the_last_forward_that_keeps_a_graph():
    assert [str(a) for a in sorted(WHOLE.actions) if WHOLE.takes_loss(a)] == ["2F0"]
    assert [str(a) for a in sorted(SPLIT.actions) if SPLIT.takes_loss(a)] == ["2R0"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("", "has 0 lanes and 0 actions"),
        ("0F0 0F0 0B0", "the table has 0F0 2 times; an action is done once"),
        ("0F0 0B0\n0F0 1F0 1B0", "the table has 0F0 2 times"),
        ("0T0 0F0 0B0", r"the table has 0T0 but T is none of the passes it names \(none\); name it"),
        ("0F0 0B0 0F1", "stage 0 needs for micro-batch 1 either 0B1 or both 0I1 and 0W1, but the table has none"),
        ("0F0 0I0", "either 0B0 or both 0I0 and 0W0, but the table has 0I0"),
        ("0F0 0W0", "but the table has 0W0"),
        ("0F0 0B0 0W0", "but the table has 0B0 and 0W0"),
        ("0F0 0B0 0I0 0W0", "but the table has 0B0 and 0I0 and 0W0"),
        ("0B0", "the table lacks 0F0"),
        ("0F0 0B0 0F2 0B2", "the table lacks 0F1"),
        ("0F0 0B0\n2F0 2B0", "the table lacks 1F0"),
        ("0F0 0B0 0F1 0B1\n1F0 1B0", "the table lacks 1F1"),
        ("0F0 0F1 0B0\n1F0 1F1 1B0 1B1 0B1", "the table has 0F0 on lane 0 but stage 0 is on another, too"),
    ],
)
def test_a_table_that_is_no_step_is_refused_by_its_first_action_too_few_or_too_many(table: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        written(table).check()


def test_a_pass_that_is_not_for_all_micro_batches_is_refused():
    with pytest.raises(ValueError, match="the table lacks 0T1"):
        written("0T0 0F0 0B0 0F1 0B1", passes="T").check()
    with pytest.raises(ValueError, match="the table lacks 1T0"):
        written("0T0 0F0 0B0\n1F0 1B0", ahead="T").check()


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("0B0 0F0", "0B0 waits for 0F0"),
        ("0T0 0F0 0B0\n1F0 1T0 1B0", "1F0 waits for 1T0"),
        ("0F0 0W0 0I0", "0W0 waits for 0I0"),
        ("0F0 0I0 0R0 0W0", "0I0 waits for 0R0"),
        ("0R0 0F0 0B0", "0R0 waits for 0F0"),
        ("0F0 0F1 0B1 0B0\n1F0 1B0 1F1 1B1\n2F1 2B1 2F0 2B0", "waits for"),  # a ring over three lanes
    ],
)
def test_an_impossible_table_is_refused_and_its_first_impossible_action_named(table: str, complaint: str):
    with pytest.raises(ValueError, match=f"the table cannot run: .*{complaint}"):
        written(table, "T" if "T" in table else "").check()


@pytest.mark.parametrize(
    ("table", "complaint"),
    [("0F0 0B0\n1F0", "0B0 waits for 1B0"), ("0F0 0B0\n1T0 1F0 1B0", "1T0 waits for 0T0")],
)
def test_an_order_that_waits_for_an_action_in_no_lane_is_refused(table: str, complaint: str):
    with pytest.raises(ValueError, match=f"the table cannot run: {complaint}"):
        written(table, "T" if "T" in table else "").rank_order([0, 1], 0)


@reproducible
@given(tables(), st.randoms(use_true_random=False))
def test_a_table_without_one_of_its_actions_is_refused(table: ActionTable, random):
    gone = random.choice(sorted(table.actions))
    lanes = tuple(tuple(a for a in lane if a != gone) for lane in table.lanes)
    rest = ActionTable("custom", lanes, table.passes, table.ahead)
    if gone.kind == "R":  # a stage may recompute some micro-batches only
        rest.check()
    else:
        with pytest.raises(ValueError, match=r"lacks|needs for micro-batch|0 actions"):
            rest.check()


def test_csv_of_a_table():
    table = action_table("td1f1b", 2, 2, "TD", ahead="T")
    assert table.to_csv() == (
        "# schedule=td1f1b passes=D ahead=T\n0D0,0D1,0F0,0F1,0T0,0T1,0B0,0B1\n1D0,1D1,1F0,1B0,1F1,1B1,1T0,1T1\n"
    )
    assert str(table) == "0D0 0D1 0F0 0F1 0T0 0T1 0B0 0B1\n1D0 1D1 1F0 1B0 1F1 1B1 1T0 1T1\n"


@reproducible
@given(tables())
def test_csv_both_ways(table: ActionTable):
    assert ActionTable.from_csv(table.to_csv()) == table


def test_empty_cells_and_spaces_of_a_csv_are_waits():
    table = ActionTable.from_csv("0F0,0F1,,,0B0, ,0B1\n,1F0, 1B0,1F1,1B1,,\n")
    assert (table.schedule, table.passes, table.ahead) == ("custom", "", "")
    assert str(table) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n"


def test_a_cell_that_is_no_action_is_named_with_its_line():
    with pytest.raises(ValueError, match="line 2 of the table: 'F0' is no action"):
        ActionTable.from_csv("0F0,0B0\nF0,1B0\n")
    with pytest.raises(ValueError, match="line 3 of the table: '1SEND_F0' is no action"):
        ActionTable.from_csv("# schedule=x\n0F0,0B0\n1F0,1SEND_F0\n")


def test_a_csv_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="0B0 waits for 0F0"):
        ActionTable.from_csv("0B0,0F0\n")


@reproducible
@given(tables())
def test_with_and_without_what_is_ahead(table: ActionTable):
    now, ahead = table.without_ahead(), table.only_ahead()
    assert now.actions | ahead.actions == table.actions
    assert not now.actions & ahead.actions
    assert now.check().ahead == ""
    assert {a.kind for a in ahead.actions} == set(table.ahead)
    for before, lane in zip(table.lanes, now.lanes, strict=True):
        assert lane == tuple(a for a in before if a in now.actions)
    if table.ahead:
        assert [sorted(a) for a in _orders(ahead, ahead.lane_of).values()] == [sorted(a) for a in ahead.lanes]


def _orders(table: ActionTable, owners: Sequence[int]) -> Mapping[int, Sequence[Action]]:
    return {rank: table.rank_order(owners, rank) for rank in sorted(set(owners))}


@reproducible
@given(tables())
def test_a_rank_with_one_lane_runs_the_lanes_own_order(table: ActionTable):
    assert tuple(_orders(table, table.lane_of).values()) == table.lanes


@reproducible
@given(tables(max_m=8), st.data())
def test_the_orders_of_the_ranks_never_wait_for_each_other_in_a_ring(table: ActionTable, data: st.DataObject):
    """Lanes on ranks in any way: all on one, in turn, or anyhow."""
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=len(table.lanes), max_size=len(table.lanes)))
    owners = [ranks[lane] for lane in table.lane_of]
    orders = _orders(table, owners)
    assert sorted(a for order in orders.values() for a in order) == sorted(table.actions)
    for lane, actions in enumerate(table.lanes):
        on_lane = {stage for stage in range(table.num_stages) if table.lane_of[stage] == lane}
        assert tuple(a for a in orders[ranks[lane]] if a.stage in on_lane) == actions, "each lane keeps its own order"
    played = play(list(orders.values()), lambda a: [(needed, 0.0) for needed in table.needs[a]], lambda a: 1.0)
    assert played.keys() == table.actions
