"""A run that was stopped goes on as if nothing had happened: every bit of it, on the same layout."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpdqn.checkpoint.contents import contents, differences
from mpdqn.launch import launch
from mpdqn.logs import read_progress
from mpdqn.mesh import World
from mpdqn.records import RECORDS, read_records
from mpdqn.train import TrainConfig, TrainResult
from mpdqn.train.check import check
from mpdqn.train.run import train_in
from tests.train.settings import small
from tests.train.stopping import train_for, train_parts

pytestmark = [pytest.mark.pool, pytest.mark.timeout(900)]

AHEAD = {"lookahead": 1, "prefetch": 1}
RUNS: dict[str, dict[str, Any]] = {
    "single": {},
    "rainbow-ahead": {"agent": "rainbow", **AHEAD},
    "lag": {"actor_lag": 3, "round_steps": 2, "n_step": 3, "frames": 1_600},
    "atari": {"env": "breakout", "frames": 6_400, "min_replay": 400, "replay_period": 16, "target_period": 20},
    "on-disk": {"replay_dir": Path("replay"), "prioritized": True},
    "dp2": {"layout": "dp2"},
    "rainbow-pp2-td1f1b": {"layout": "pp2-td1f1b/m2", "agent": "rainbow", "actor_lag": 1, **AHEAD},
    "acting-ranks": {"layout": "single@1", "actors": "workers", "prioritized": True},
    "acting-ranks-lag2": {"layout": "single@1", "actors": "workers", "actor_lag": 2},
    "dp2xpp2": {"layout": "dp2xpp2-1f1b/m2"},
}
STOPS = [40, 45]
"""Before the first update, and 87 rounds in all: amid learning, after the ring has come round; of 125 or more."""


def config_of(name: str, out: Path) -> TrainConfig:
    settings = {key: out / value if key == "replay_dir" else value for key, value in RUNS[name].items()}
    return small(out, **{"frames": 1_000, "checkpoint_at_end": True, "log_every": 300, "capacity": 500} | settings)


def run_both(configs: list[tuple[TrainConfig, TrainConfig]]) -> list[list[TrainResult]]:
    """Each run without a stop, and another one with two, in one world."""
    with World.open("cpu", 60) as world:
        return [[train_in(world, check(whole)), *train_parts(world, parts, STOPS)] for whole, parts in configs]


IN_EVERY_TEST = ("rainbow-ahead", "lag", "atari", "rainbow-pp2-td1f1b", "acting-ranks-lag2")
"""What the kill drill's small form, which is in every test too, does not have; the others are in the matrix."""
IN_THE_MATRIX = tuple(name for name in RUNS if name not in IN_EVERY_TEST)

Results = dict[str, list[TrainResult]]


def run_all(names: Sequence[str], folders: pytest.TempPathFactory) -> Results:
    """Of each run: the one without a stop, and the three parts of the one with two."""
    configs = {name: (config_of(name, folders.mktemp(name)), config_of(name, folders.mktemp(name))) for name in names}
    ranks = {name: check(configs[name][0]).num_ranks for name in names}
    found: Results = {}
    for num_ranks, group in itertools.groupby(sorted(names, key=ranks.__getitem__), ranks.__getitem__):
        of_one_size = list(group)
        outcome = launch(run_both, [configs[name] for name in of_one_size], num_workers=num_ranks)[0]
        found |= zip(of_one_size, outcome, strict=True)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_all(IN_EVERY_TEST, tmp_path_factory)


@pytest.fixture(scope="module")
def more_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_all(IN_THE_MATRIX, tmp_path_factory)


@pytest.mark.parametrize("name", IN_EVERY_TEST)
def test_a_run_that_was_stopped_twice_is_the_run(name: str, results: Results) -> None:
    assert_the_same_run(name, *results[name])


@pytest.mark.matrix
@pytest.mark.parametrize("name", IN_THE_MATRIX)
def test_more_runs_that_were_stopped_twice(name: str, more_results: Results) -> None:
    assert_the_same_run(name, *more_results[name])


def assert_the_same_run(
    name: str, whole: TrainResult, first: TrainResult, second: TrainResult, last: TrainResult
) -> None:
    """Episodes, weights, progress, record, and every byte of the checkpoint of the end: nothing lost, nothing twice."""
    config = config_of(name, whole.folder.parent)
    job = check(replace(config, replay_dir=None))
    assert [first.stopped_at, second.stopped_at, last.stopped_at] == [
        *(job.frames_after(rounds) for rounds in (41, 87)),
        None,
    ]
    assert last.folder == first.folder
    assert last.episodes == whole.episodes
    assert len(whole.episodes) > (40 if "minatar" in config.env else 3)
    weights = [torch.load(result.folder / "weights.pt") for result in (whole, last)]
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
    rates = ("frames_per_s", "updates_per_s", "late_passes")
    for one, other in zip(read_progress(whole.folder), read_progress(last.folder), strict=True):
        assert {k: v for k, v in one.items() if k not in rates} == {k: v for k, v in other.items() if k not in rates}
    (record,), (same,) = read_records(whole.folder / RECORDS), read_records(last.folder / RECORDS)
    assert dict(record.values) | {"seconds": 0} == dict(same.values) | {"seconds": 0}

    held, held_too = contents(whole.folder), contents(last.folder)
    assert differences(held, held_too) == []
    assert held.keys() <= held_too.keys(), "frames that were written in parts begin with some that the ring has lost"
    assert sum(n.startswith("frame ") for n in held) > 500
    assert {n.split(".")[0] for n in held} >= {"online", "target", "adam", "replay", "games", "run"}


def test_these_runs_differ_from_each_other(results: Results) -> None:
    """Else it would not show that what makes them differ is kept."""
    ends = {json.dumps(read_progress(runs[0].folder)[-1].get("loss")) for runs in results.values()}
    assert len(ends) == len(results)


PARTS: list[tuple[dict[str, Any], int]] = [
    ({"layout": "single@1"}, 90),
    ({"layout": "dp2xpp2-1f1b/m2"}, 50),
    ({"layout": "pp2-1f1b/m2"}, 10**9),
]


def part(config: TrainConfig, rounds: int) -> TrainResult:
    with World.open("cpu", 60) as world:
        return train_for(world, config, rounds)


@pytest.mark.parametrize(
    ("settings", "num_parts"),
    [
        pytest.param({"agent": "rainbow", "actor_lag": 1, **AHEAD}, 2, id="rainbow"),
        pytest.param({"agent": "rainbow", "actor_lag": 1, **AHEAD}, 3, id="rainbow-3", marks=pytest.mark.matrix),
        pytest.param({}, 3, id="dqn-3", marks=pytest.mark.matrix),
    ],
)
def test_a_run_goes_on_on_other_layouts(settings: dict[str, Any], num_parts: int, tmp_path: Path) -> None:
    """1 × 1, then 2 × 2, then 1 × 2, in float64: the same episodes, and weights within 1e-10."""
    config = small(tmp_path / "whole", dtype="float64", layout="single@1", frames=1_280, **settings)
    whole = part(config, 10**9)
    config = replace(config, out=tmp_path / "parts")
    folder: Path | None = None
    for k, (layout, rounds) in enumerate(PARTS[:num_parts], start=1):
        config = replace(config, resume=folder, **layout)
        length = rounds if k < num_parts else 10**9
        num_ranks = check(config).num_ranks
        result = part(config, length) if num_ranks == 1 else launch(part, config, length, num_workers=num_ranks)[0]
        folder = result.folder
    assert result.episodes == whole.episodes
    one, other = (torch.load(r.folder / "weights.pt") for r in (whole, result))
    error = sum(float(((one[n] - other[n]) ** 2).sum()) for n in one) ** 0.5
    assert error <= 1e-10 * sum(float((t**2).sum()) for t in one.values()) ** 0.5
