"""What every schedule must keep, whoever wrote it: one contract, by name.

Updates against the single process and every axis are test_transparency.py's, golden tables and bubbles schedule/'s.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from mpdqn.mesh import World
from mpdqn.schedule import SCHEDULES, Action, ActionTable, action_table, check_virtual, lane_of_stages
from tests.comparator import errors, violations
from tests.transparency import run_case, run_reference, tiny_case

SIZES = ((1, 1), (1, 5), (2, 1), (2, 4), (3, 2), (3, 7), (4, 8), (5, 3))
"""(p, m), also with m below p and m that p does not divide."""


def tables(schedule: str) -> Iterator[tuple[ActionTable, int, int, str]]:
    """Tables of a schedule with their p and m, and what may run ahead."""
    virtual = SCHEDULES[schedule].virtual
    for (p, m), ahead in itertools.product(SIZES, ("", "T")):
        for again in ((), range(p * virtual), (p * virtual - 1,)):
            yield action_table(schedule, p, m, "TD", ahead=ahead, recompute=again), p, m, ahead


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_table_is_a_step(schedule: str) -> None:
    """Everything is there once, nothing else is, every stage is on its lane, and it can run."""
    for table, p, m, ahead in tables(schedule):
        stages = p * SCHEDULES[schedule].virtual
        assert table.check() is table
        assert (table.schedule, len(table.lanes), table.num_stages, table.num_microbatches) == (schedule, p, stages, m)
        assert table.lane_of == lane_of_stages(schedule, p, SCHEDULES[schedule].virtual)
        assert sorted(table.passes + table.ahead) == ["D", "T"]
        assert table.ahead == (ahead if SCHEDULES[schedule].filled else "")
        kinds = Counter(action.kind for action in itertools.chain(*table.lanes))
        assert {kinds[kind] for kind in "FTD"} == {stages * m}
        assert (kinds["B"], kinds["I"], kinds["W"]) in ((stages * m, 0, 0), (0, stages * m, stages * m))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_table_is_a_pure_function_of_its_arguments_and_reads_back(schedule: str) -> None:
    first, second = list(tables(schedule)), list(tables(schedule))
    assert first == second
    for table, *_ in first:
        assert ActionTable.from_csv(table.to_csv()) == table


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_orders_of_the_ranks_fit_together(schedule: str) -> None:
    """Whoever holds the lanes: played side by side, all come to their end and nobody waits for ever."""
    for table, p, _, _ in tables(schedule):
        for ranks in ([0] * p, list(range(p)), [lane % 2 for lane in range(p)]):
            owners = [ranks[lane] for lane in table.lane_of]
            orders = {rank: list(table.rank_order(owners, rank)) for rank in set(owners)}
            assert sorted(itertools.chain(*orders.values())) == sorted(table.actions)
            done: set[Action] = set()
            while any(orders.values()):
                ready = [r for r, order in orders.items() if order and done.issuperset(table.needs[order[0]])]
                assert ready, "every rank waits"
                for rank in ready:
                    done.add(orders[rank].pop(0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_passes_ahead_hold_up_nothing(schedule: str) -> None:
    """What is left without them is a step, what they are alone can run, and no action of this step needs one."""
    for table, *_ in tables(schedule):
        left, alone = table.without_ahead(), table.only_ahead()
        assert left.check().actions | alone.actions == table.actions
        assert not left.actions & alone.actions
        assert all(not alone.actions.intersection(table.needs[action]) for action in left.actions)
        assert sorted(alone.rank_order([0] * table.num_stages, 0)) == sorted(alone.actions)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_weight_gradient_comes_after_its_input_gradient_and_a_recomputation_before_its_backward(
    schedule: str,
) -> None:
    for table, *_ in tables(schedule):
        for lane in table.lanes:
            place = {action: k for k, action in enumerate(lane)}
            for action, k in place.items():
                if action.kind == "W":
                    assert place[action._replace(kind="I")] < k
                if action.kind == "R":
                    assert place[action._replace(kind="F")] < k
                    assert k < min(place.get(action._replace(kind=kind), len(lane)) for kind in "BI")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sizes_that_a_schedule_cannot_have_are_refused(schedule: str) -> None:
    for p, m in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="is 0 but must be at least 1"):
            action_table(schedule, p, m, "TD")
    check_virtual(schedule, SCHEDULES[schedule].virtual)
    with pytest.raises(ValueError, match=rf"{schedule} has (exactly|at least) \d stages on each rank, not 0"):
        action_table(schedule, 2, 2, "TD", virtual=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_learns_what_the_single_process_learns(alone: World, schedule: str) -> None:
    case = tiny_case(schedule, placement="stacked", lookahead=1)
    found = errors(alone, case, run_case(alone, case), run_reference(alone, case))
    assert violations(case, found) == []
