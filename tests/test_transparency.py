"""Transparency: whatever the layout, the computation is that of the single process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpdqn.launch import launch
from mpdqn.mesh import World
from mpdqn.plan import RECOMPUTATION
from mpdqn.schedule import SCHEDULES
from tests.comparator import errors, violations
from tests.transparency import UPDATES, Case, References, read_trace, run_case, tiny_case

pytestmark = pytest.mark.pool

MICROBATCHES = (1, 3, 4, 8, 16)
LAYOUTS = ((1, 1), (2, 1), (1, 2), (1, 3), (2, 2))
"""(d, p): single, DP 2, PP 2, PP 3, DP 2 × PP 2."""


def small_matrix() -> Iterator[Case]:
    """What `make test` runs: every family, layout, schedule, m and V at least once, not all combinations."""
    for (d, p), m in itertools.product(LAYOUTS, (1, 2, 4, 8)):
        for schedule in ("gpipe", "1f1b") if p > 1 else ("gpipe",):
            yield Case(family="nature", data=d, pipeline=p, schedule=schedule, m=m)
        yield Case(family="impala", data=d, pipeline=p, schedule="1f1b" if m in (1, 4) else "gpipe", m=m)
    for d, p in LAYOUTS:
        if (d, p) in ((1, 1), (1, 2), (2, 2)):  # half a minute for five
            yield Case(family="resnet18", data=d, pipeline=p, schedule="1f1b", m=4, batch_size=8)
        yield Case(family="nature", data=d, pipeline=p, m=4, agent="dqn", optimizer="sgd", shards=2)
        yield Case(family="impala", data=d, pipeline=p, m=4, head="dueling", memory_format="channels_last")
        yield Case(family="nature", data=d, pipeline=p, schedule="1f1b", m=4, dtype="float32")
        if d == 1:
            yield Case(family="nature", data=d, pipeline=p, schedule="1f1b", m=2, shards=1)
    for d, p in ((1, 2), (1, 3), (2, 2)):
        yield Case(family="impala", data=d, pipeline=p, schedule="1f1b", m=4, placement="stacked")
    for (p, schedule), m in itertools.product(((4, "1f1b"), (4, "gpipe"), (3, "1f1b")), (2, 8)):
        yield Case(family="nature", pipeline=p, schedule=schedule, m=m, placement="interleaved")


def whole_matrix() -> Iterator[Case]:
    """What `make test-all` runs: every family × layout × schedule × m × V, and every update rule and depth at V = 4."""
    for (d, p), m in itertools.product(LAYOUTS, (1, 2, 4, 8)):
        for schedule in ("gpipe", "1f1b") if p > 1 else ("gpipe",):
            layout = Case(data=d, pipeline=p, schedule=schedule, m=m)
            for family in ("nature", "impala", "resnet18"):
                case = replace(layout, family=family)
                yield from (replace(case, shards=shards) for shards in (1, 2, 4) if shards % d == 0)
                yield replace(case, optimizer="sgd")
                yield replace(case, agent="dqn")
                yield replace(case, dtype="float32")
            yield from (replace(layout, family=family) for family in ("resnet34", "resnet50", "resnet101"))


def covering_schedules() -> Iterator[Case]:
    """What `make test` runs of `whole_schedules`: each schedule with every value of every axis, on four ranks at most;
    and what lies beside the axes."""
    layouts = ((1, 2), (1, 3), (1, 4), (2, 2))
    for k, schedule in enumerate(SCHEDULES):
        for row, m in enumerate(MICROBATCHES):
            d, p = layouts[(row + k) % 4]
            recompute, lookahead = RECOMPUTATION[(row + k // 2) % 3], (row + k) % 2
            yield tiny_case(schedule, data=d, pipeline=p, m=m, recompute=recompute, lookahead=lookahead)
    for schedule in ("td1f1b", "tdzb", "zbv"):
        yield tiny_case(schedule, lookahead=1, target_tau=0.5)
        yield tiny_case(schedule, data=2, lookahead=1, accumulation=2)
        yield tiny_case(schedule, pipeline=3, lookahead=1, recompute="mixed")
    yield tiny_case("td1f1b", data=2, lookahead=1, accumulation=2, recompute="mixed", target_tau=0.5, m=3)
    yield tiny_case("1f1b", data=2, accumulation=3)
    yield tiny_case("interleaved_1f1b", data=2, accumulation=2)
    yield tiny_case("looped_bfs", recompute="mixed")
    for schedule in ("td1f1b", "tdzb"):
        yield tiny_case(schedule, pipeline=1, lookahead=1)
        yield tiny_case(schedule, pipeline=3, lookahead=1, agent="dqn", optimizer="sgd")
        yield tiny_case(schedule, pipeline=4, lookahead=1, placement="interleaved")
        yield Case(family="nature", pipeline=2, schedule=schedule, m=4, lookahead=1, dtype="float32")
        yield Case(family="impala", pipeline=3, schedule=schedule, m=4, lookahead=1, memory_format="channels_last")
    yield Case(family="nature", data=2, pipeline=2, schedule="zb_h1", m=2, memory_format="channels_last")
    yield tiny_case("zb_h1", pipeline=3, placement="interleaved")
    yield tiny_case("zbv", pipeline=3, placement="stacked")
    yield tiny_case("zbv", data=2, placement="stacked", recompute="all")
    yield tiny_case("interleaved_1f1b", virtual=3)
    yield tiny_case("interleaved_1f1b", virtual=3, m=3, placement="stacked")
    yield tiny_case("looped_bfs", virtual=3, m=8)
    yield tiny_case("looped_bfs", virtual=1, pipeline=4)


def whole_schedules() -> Iterator[Case]:
    """What `make test-all` runs of the schedules: every one × p × d × m × recomputation × lookahead."""
    axes = itertools.product((2, 3, 4), (1, 2), MICROBATCHES, RECOMPUTATION, (0, 1))
    for (p, d, m, recompute, lookahead), schedule in itertools.product(axes, SCHEDULES):
        yield tiny_case(schedule, data=d, pipeline=p, m=m, recompute=recompute, lookahead=lookahead)


# What each agent adds to plain and Double DQN, which every case above runs: other passes, losses, heads, noise.
OTHER_AGENTS = ("dueling_dqn", "c51", "noisy_dqn", "rainbow", "munchausen_dqn", "hl_gauss", "decqn")


def covering_agents() -> Iterator[Case]:
    """What `make test` runs of `whole_agents`: each agent in every kind of layout, a refresh inside."""
    for agent in OTHER_AGENTS:
        yield tiny_case("gpipe", pipeline=1, agent=agent)
        yield tiny_case("gpipe", pipeline=1, data=2, agent=agent)
        yield tiny_case("1f1b", agent=agent)
        yield tiny_case("td1f1b", lookahead=1, agent=agent)
        yield tiny_case("td1f1b", data=2, lookahead=1, accumulation=2, target_tau=0.5, agent=agent)
        yield tiny_case("1f1b", data=2, agent=agent, recompute="all")
        yield tiny_case("zbv", agent=agent, lookahead=1)
        yield tiny_case("interleaved_1f1b", agent=agent, recompute="mixed")
        yield tiny_case("tdzb", pipeline=3, lookahead=1, agent=agent, recompute="boundaries")
    for agent in ("prioritized_dqn", "rainbow"):
        yield tiny_case("gpipe", pipeline=1, data=2, agent=agent, prioritized=True)
        yield tiny_case("1f1b", data=2, agent=agent, prioritized=True)
        yield tiny_case("td1f1b", lookahead=1, agent=agent, prioritized=True)
        yield tiny_case("td1f1b", data=2, lookahead=1, agent=agent, prioritized=True)
    for agent in ("rainbow", "munchausen_dqn", "decqn"):
        yield Case(family="nature", data=2, pipeline=2, schedule="1f1b", m=4, agent=agent)
        yield Case(family="nature", pipeline=2, schedule="td1f1b", m=4, lookahead=1, agent=agent, dtype="float32")


def whole_agents() -> Iterator[Case]:
    """What `make test-all` runs of the agents: each with every schedule × p × d × recomputation × lookahead."""
    axes = itertools.product((2, 3), (1, 2), RECOMPUTATION, (0, 1), SCHEDULES, OTHER_AGENTS)
    for p, d, recompute, lookahead, schedule, agent in axes:
        yield tiny_case(schedule, data=d, pipeline=p, recompute=recompute, lookahead=lookahead, agent=agent)


def run_matrix(references: dict[Case, Path], updates: int = UPDATES) -> dict[Case, dict[str, float]]:
    """On rank 0 of a pool: the errors of every case, given the file of its reference."""
    torch.set_num_threads(1)
    found, read = {}, {}
    with World.open("cpu", 60) as world:
        for case, path in references.items():
            if path not in read:
                read = {path: read_trace(path)}  # they come one after the other, and may be large
            found[case] = errors(world, case, run_case(world, case, updates=updates), read[path])
    return found


def by_reference(cases: Iterator[Case]) -> list[Case]:
    return sorted(dict.fromkeys(cases), key=lambda case: str(case.reference()))


SMALL = by_reference(itertools.chain(small_matrix(), covering_schedules(), covering_agents()))
WHOLE = by_reference(whole_matrix())
WHOLE_SCHEDULES = by_reference(itertools.chain(whole_schedules(), whole_agents()))


class Matrix:
    """The errors of many cases: when a test asks for one, all of its group are found, so that a run can be stopped.

    Args:
        cases: all of them.
        references: the single process's traces, computed before the pool of a group starts.
        group: what the cases of one pool have in common; it has as many ranks as the largest of them needs.
    """

    def __init__(self, cases: list[Case], references: References, group: Callable[[Case], object]) -> None:
        self._references, self._group, self._groups = references, group, dict[object, list[Case]]()
        for case in cases:
            self._groups.setdefault(group(case), []).append(case)
        self._found: dict[Case, dict[str, float]] = {}

    def __getitem__(self, case: Case) -> dict[str, float]:
        if case not in self._found:
            group = self._groups[self._group(case)]
            paths = self._references.of(group)
            self._found |= launch(run_matrix, paths, num_workers=max(case.ranks for case in group))[0]
            del self._groups[self._group(case)]
            self._references.keep(itertools.chain.from_iterable(self._groups.values()))
        return self._found[case]


@pytest.fixture(scope="module")
def references(alone: World, tmp_path_factory: pytest.TempPathFactory) -> References:
    torch.set_num_threads(1)
    return References(alone, tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="module")
def small(references: References) -> Matrix:
    """Each case among as few ranks as it needs: the others would only wait."""
    return Matrix(SMALL, references, lambda case: case.ranks)


@pytest.fixture(scope="module")
def whole(references: References) -> Matrix:
    return Matrix(WHOLE, references, Case.reference)


@pytest.fixture(scope="module")
def whole_schedules_found(references: References) -> Matrix:
    return Matrix(WHOLE_SCHEDULES, references, lambda case: (case.reference(), case.ranks))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.timeout(900)
def test_layout_computes_what_the_single_process_computes(case: Case, small: Matrix) -> None:
    assert violations(case, small[case]) == []


@pytest.mark.matrix
@pytest.mark.parametrize("case", WHOLE, ids=str)
@pytest.mark.timeout(7200)
def test_whole_matrix(case: Case, whole: Matrix) -> None:
    assert violations(case, whole[case]) == []


@pytest.mark.matrix
@pytest.mark.parametrize("case", WHOLE_SCHEDULES, ids=str)
@pytest.mark.timeout(7200)
def test_whole_schedules(case: Case, whole_schedules_found: Matrix) -> None:
    assert violations(case, whole_schedules_found[case]) == []


@pytest.mark.timeout(600)
def test_three_hundred_updates_with_passes_of_the_next_batch_in_the_gaps(alone: World, tmp_path: Path) -> None:
    """Nothing adds up: 42 refreshes inside, and most updates before and after one."""
    # With Adam on random frames, rounding doubles every ten updates, in any layout: 1e-16 is 1e-4 after three hundred.
    case = tiny_case("td1f1b", lookahead=1, target_period=7, optimizer="sgd")
    references = References(alone, tmp_path, updates=300).of([case])
    found = launch(run_matrix, references, 300, num_workers=case.ranks)[0]
    assert violations(case, found[case]) == [], found


def reruns(cases: list[Case]) -> list[bool]:
    """On every rank: whether two runs of each case left the same bits."""
    torch.set_num_threads(1)
    same = []
    with World.open("cpu", 60) as world:
        for case in cases:
            first, second = run_case(world, case), run_case(world, case)
            pairs = [(first.change, second.change), *zip(first.gradients, second.gradients, strict=True)]
            same.append(
                all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
                and all(map(torch.equal, first.td_errors, second.td_errors))
                and (first.norms, first.losses) == (second.norms, second.losses)
            )
    return same


def test_two_runs_of_a_layout_are_bit_identical() -> None:
    cases = [
        Case(family="impala", data=d, pipeline=p, schedule=schedule, m=4, dtype=dtype)
        for d, p in LAYOUTS
        for schedule in (("gpipe", "1f1b") if p > 1 else ("gpipe",))
        for dtype in ("float32", "float64")
    ]
    cases += [
        tiny_case(schedule, data=d, pipeline=p, lookahead=1, recompute=recompute, dtype="float32")
        for schedule, recompute in (("td1f1b", "none"), ("tdzb", "all"), ("zbv", "none"))
        for d, p in ((1, 4), (2, 2))
    ]
    for rank, same in enumerate(launch(reruns, cases, num_workers=4)):
        assert [case for case, equal in zip(cases, same, strict=True) if not equal] == [], f"rank {rank}"


def test_cases_can_be_told_apart() -> None:
    for cases in (SMALL, WHOLE, WHOLE_SCHEDULES):
        assert len({str(case) for case in cases}) == len(cases)
        assert all(dataclasses.asdict(case.reference())["m"] == 1 for case in cases)


def test_the_small_matrix_has_every_schedule_with_every_value_of_every_axis() -> None:
    small, whole = ([dataclasses.asdict(case) for case in cases] for cases in (SMALL, WHOLE_SCHEDULES))
    for axis in ("pipeline", "data", "m", "recompute", "lookahead"):
        pairs = {(case["schedule"], case[axis]) for case in whole}
        assert pairs <= {(case["schedule"], case[axis]) for case in small if case["family"] == "tiny"}, axis
    assert max(case.ranks for case in SMALL) == 4
