"""Action tables: golden files, orders of ranks that hold several stages, and the bubble's formula."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.schedule.actions import Action
from mpdqn.schedule.tables import SCHEDULES, Table, action_table, bubble_fraction, rank_order
from tests.schedule.simulation import blocked, end_times

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(1, 1), (2, 2), (3, 4), (4, 3), (4, 8)]

reproducible = settings(deadline=None, derandomize=True, database=None)
schedules = st.sampled_from(SCHEDULES)
passes = st.sampled_from(["", "T", "TD"])


def as_text(table: Table) -> str:
    return "".join(" ".join(map(str, actions)) + "\n" for actions in table)


def parse(text: str) -> Table:
    return tuple(tuple(map(Action.parse, line.split())) for line in text.splitlines())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_golden_tables(schedule: str, p: int, m: int):
    """One line per stage. A difference is a change of the schedule: read it before the file is written anew."""
    golden = (GOLDEN / f"{schedule}-p{p}-m{m}-TD.txt").read_text()
    table = action_table(schedule, p, m, "TD")
    assert as_text(table) == golden
    assert parse(golden) == table


def test_every_golden_file_is_tested():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{s}-p{p}-m{m}-TD.txt" for s in SCHEDULES for p, m in SIZES}


@reproducible
@given(schedules, st.integers(1, 6), st.integers(1, 12), passes)
def test_each_stage_does_each_action_once_and_can(schedule: str, p: int, m: int, letters: str):
    table = action_table(schedule, p, m, letters)
    assert len(table) == p
    for stage, actions in enumerate(table):
        assert sorted(actions) == sorted(Action(stage, kind, i) for kind in f"FB{letters}" for i in range(m))
    assert not blocked(dict(enumerate(table)), p, letters)


@reproducible
@given(st.integers(1, 6), st.integers(1, 12), passes)
def test_in_1f1b_at_most_p_minus_j_micro_batches_are_in_flight(p: int, m: int, letters: str):
    most = {"1f1b": [min(m, p - j) for j in range(p)], "gpipe": [m] * p}
    for schedule in SCHEDULES:
        for stage, actions in enumerate(action_table(schedule, p, m, letters)):
            flying = [sum({"F": 1, "B": -1}.get(a.kind, 0) for a in actions[: n + 1]) for n in range(len(actions))]
            assert min(flying) >= 0
            assert max(flying) == most[schedule][stage]


def test_an_unknown_schedule_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown schedule '1f1'; did you mean '1f1b'"):
        action_table("1f1", 2, 2)


@reproducible
@given(schedules, st.integers(1, 5), st.integers(1, 8), passes)
def test_a_rank_with_one_stage_runs_the_stages_own_order(schedule: str, p: int, m: int, letters: str):
    table = action_table(schedule, p, m, letters)
    for stage in range(p):
        assert rank_order(table, range(p), stage, letters) == table[stage]


@st.composite
def placements(draw: st.DrawFn) -> list[int]:
    """The owners of up to 6 stages: all on one rank, interleaved, or anyhow."""
    p = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["stacked", "interleaved", "any"]))
    if kind == "stacked":
        return [draw(st.integers(0, 3))] * p
    if kind == "interleaved":
        ranks = draw(st.integers(1, 3))
        return [stage % ranks for stage in range(p)]
    return draw(st.lists(st.integers(0, 3), min_size=p, max_size=p))


@settings(reproducible, max_examples=300)
@given(schedules, placements(), st.integers(1, 8), passes)
def test_the_orders_of_the_ranks_never_wait_for_each_other_in_a_ring(
    schedule: str, owners: list[int], m: int, letters: str
):
    table = action_table(schedule, len(owners), m, letters)
    orders = {rank: rank_order(table, owners, rank, letters) for rank in set(owners)}
    assert sorted(a for order in orders.values() for a in order) == sorted(a for actions in table for a in actions)
    for rank, order in orders.items():
        for stage in (stage for stage, owner in enumerate(owners) if owner == rank):
            assert tuple(a for a in order if a.stage == stage) == table[stage], "each stage keeps its own order"
    assert not blocked(orders, len(owners), letters)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("0B0 0F0", "0B0 waits for 0F0"),
        ("0F0 0B0\n1F0", "0B0 waits for 1B0"),
        ("0F0 0B0\n1T0 1F0 1B0", "1T0 waits for 0T0"),
        ("0T0 0F0 0B0\n1F0 1T0 1B0", "1F0 waits for 1T0"),
    ],
)
def test_an_impossible_table_is_refused_and_its_first_impossible_action_named(table: str, complaint: str):
    with pytest.raises(ValueError, match=f"the table cannot run: {complaint}"):
        rank_order(parse(table), range(table.count("\n") + 1), 0, "T" if "T" in table else "")


def simulated_bubble(schedule: str, p: int, m: int, num_passes: int) -> list[float]:
    """The share of the step in which each rank waits, by simulation with F = T = D = 1 and B = 2."""
    seconds = {"F": 1.0, "T": 1.0, "D": 1.0, "B": 2.0}
    table = action_table(schedule, p, m, "TD"[:num_passes])
    length = max(end_times(table, "TD"[:num_passes], seconds).values())
    return [1 - sum(seconds[action.kind] for action in actions) / length for actions in table]


@reproducible
@given(schedules, st.integers(1, 6), st.integers(1, 12), st.integers(0, 2))
def test_the_bubbles_formula_is_what_a_simulation_gives(schedule: str, p: int, m: int, num_passes: int):
    formula = bubble_fraction(p, m, 1.0, 2.0, num_passes)
    assert simulated_bubble(schedule, p, m, num_passes) == pytest.approx([formula] * p, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("p", "m", "working"), [(2, 8, 0.930), (4, 8, 0.816), (4, 16, 0.899), (8, 16, 0.792), (8, 32, 0.884)]
)
def test_three_passes_one_after_the_other_as_in_design_4(schedule: str, p: int, m: int, working: float):
    assert 1 - bubble_fraction(p, m, 1.0, 2.0, 2) == pytest.approx(working, abs=5e-4)
    assert 1 - max(simulated_bubble(schedule, p, m, 2)) == pytest.approx(working, abs=5e-4)


@reproducible
@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 100), st.floats(0.01, 100))
def test_without_passes_the_bubble_is_gpipes(p: int, m: int, forward: float, backward: float):
    assert bubble_fraction(p, m, forward, backward, 0) == pytest.approx((p - 1) / (m + p - 1), rel=1e-12)


def test_no_work_no_bubble():
    assert bubble_fraction(4, 8, 0.0, 0.0, 2) == 0.0
