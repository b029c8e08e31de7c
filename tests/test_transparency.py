"""Transparency: whatever the layout, the computation is that of the single process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mpdqn.launch import launch
from mpdqn.mesh import World
from tests.transparency import Case, Trace, errors, run_case, run_reference, violations

LAYOUTS = ((1, 1), (2, 1), (1, 2), (1, 3), (2, 2))
"""(d, p): single, DP 2, PP 2, PP 3, DP 2 × PP 2."""


def small_matrix() -> Iterator[Case]:
    """What `make test` runs: every family, layout, schedule, m and V at least once, not all combinations."""
    for family, (d, p), m in itertools.product(("nature", "impala"), LAYOUTS, (1, 2, 4, 8)):
        for schedule in ("gpipe", "1f1b") if p > 1 else ("gpipe",):
            yield Case(family=family, data=d, pipeline=p, schedule=schedule, m=m)
    for d, p in LAYOUTS:
        yield Case(family="resnet18", data=d, pipeline=p, schedule="1f1b", m=4)
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


def run_matrix(cases: list[Case]) -> dict[Case, dict[str, float]]:
    """On rank 0 of a pool: the errors of every case."""
    torch.set_num_threads(1)
    found: dict[Case, dict[str, float]] = {}
    references: dict[Case, Trace] = {}
    with World.open("cpu", 60) as world:
        for case in cases:
            if case.reference() not in references:
                references = {case.reference(): run_reference(world, case)}  # keep one: they are large
            found[case] = errors(world, case, run_case(world, case), references[case.reference()])
    return found


def by_reference(cases: Iterator[Case]) -> list[Case]:
    return sorted(dict.fromkeys(cases), key=lambda case: str(case.reference()))


SMALL = by_reference(small_matrix())
WHOLE = by_reference(whole_matrix())


@pytest.fixture(scope="module")
def small() -> dict[Case, dict[str, float]]:
    return launch(run_matrix, SMALL, num_workers=4)[0]


@pytest.fixture(scope="module")
def whole() -> dict[Case, dict[str, float]]:
    return launch(run_matrix, WHOLE, num_workers=4)[0]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.timeout(900)
def test_layout_computes_what_the_single_process_computes(case: Case, small: dict[Case, dict[str, float]]) -> None:
    assert violations(case, small[case]) == []


@pytest.mark.matrix
@pytest.mark.parametrize("case", WHOLE, ids=str)
@pytest.mark.timeout(7200)
def test_whole_matrix(case: Case, whole: dict[Case, dict[str, float]]) -> None:
    assert violations(case, whole[case]) == []


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
        for schedule in ("gpipe", "1f1b")
        for dtype in ("float32", "float64")
    ]
    for rank, same in enumerate(launch(reruns, cases, num_workers=4)):
        assert [case for case, equal in zip(cases, same, strict=True) if not equal] == [], f"rank {rank}"


def test_cases_can_be_told_apart() -> None:
    assert len({str(case) for case in SMALL}) == len(SMALL)
    assert all(dataclasses.asdict(case.reference())["m"] == 1 for case in SMALL)
