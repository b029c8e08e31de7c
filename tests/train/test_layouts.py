"""A run is the same run on every layout: its episodes, bit by bit in float64, whoever acts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mpdqn.launch import launch
from mpdqn.mesh import World
from mpdqn.train import TrainConfig, TrainResult, train
from mpdqn.train.check import check
from mpdqn.train.run import train_in
from tests.train.settings import small

pytestmark = [pytest.mark.pool, pytest.mark.timeout(900)]

FRAMES, MIN_REPLAY = 1_000, 500
"""An update for every four frames after that: two refreshes."""
RAINBOW = {"agent": "rainbow", "lookahead": 1, "prefetch": 1, "actor_lag": 1}
ACTING_RANKS = {"layout": "pp2-1f1b/m2", "actors": "workers"}

RUNS: dict[str, dict[str, Any]] = {
    "dp2": {"layout": "dp2"},
    "pp2-1f1b": {"layout": "pp2-1f1b/m2"},
    "pp2-td1f1b": {"layout": "pp2-td1f1b/m2", "lookahead": 1},
    "dp2xpp2": {"layout": "dp2xpp2-1f1b/m2"},
    "rainbow-dp2": {"layout": "dp2", **RAINBOW},
    "rainbow-pp2-td1f1b": {"layout": "pp2-td1f1b/m2", **RAINBOW},
    "acting-ranks": ACTING_RANKS,
    "acting-ranks-lag2": ACTING_RANKS | {"actor_lag": 2},
}
"""Prioritised rainbow draws ahead, in the background, and lags; an acting rank must play what its learners would."""


def alone(settings: dict[str, Any]) -> dict[str, Any]:
    """The same run on one process."""
    return {key: value for key, value in settings.items() if key not in ("layout", "actors")}


def run_of(settings: dict[str, Any], out: Path) -> TrainConfig:
    """A run of the table."""
    return small(out, **{"dtype": "float64", "frames": FRAMES, "min_replay": MIN_REPLAY} | settings)


def run_all(configs: list[TrainConfig]) -> list[TrainResult]:
    """One run after the other, in one world."""
    with World.open("cpu", 60) as world:
        return [train_in(world, check(config)) for config in configs]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """Of each run of `RUNS`, on as many processes as it has ranks."""
    configs = {name: run_of(RUNS[name], tmp_path_factory.mktemp(name)) for name in RUNS}
    ranks = {name: check(config).num_ranks for name, config in configs.items()}
    found: dict[str, TrainResult] = {}
    for num_ranks, group in itertools.groupby(sorted(RUNS, key=ranks.__getitem__), ranks.__getitem__):
        names = list(group)
        found |= zip(names, launch(run_all, [configs[name] for name in names], num_workers=num_ranks)[0], strict=True)
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """Of each run of `RUNS`, alone in this process."""
    found: dict[str, TrainResult] = {}
    for settings in map(alone, RUNS.values()):
        if str(settings) not in found:
            found[str(settings)] = train(run_of(settings, tmp_path_factory.mktemp("alone")))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_layout_plays_the_episodes_of_one_process(
    name: str, results: dict[str, TrainResult], references: dict[str, TrainResult]
) -> None:
    found, reference = results[name], references[str(alone(RUNS[name]))]
    assert len(reference.episodes) > 30
    assert found.episodes == reference.episodes
    expected = (RUNS[name].get("frames", FRAMES) - MIN_REPLAY) // 4
    assert found.rows[-1]["updates"] == reference.rows[-1]["updates"] == expected
    for one, other in zip(found.rows, reference.rows, strict=True):
        assert ("loss" in one) == ("loss" in other) == (one["updates"] > 0)
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-10, abs=0.0)


def test_these_runs_differ_from_each_other(references: dict[str, TrainResult]) -> None:
    assert len({result.episodes for result in references.values()}) == len(references) == 4


@pytest.mark.parametrize("settings", [{"layout": "pp2-1f1b/m2"}, {"actors": "workers", "round_steps": 20}])
def test_simulators_may_take_longer_than_messages(settings: dict[str, Any], tmp_path: Path) -> None:
    """Filling replay takes 10 s and a chunk of twenty steps 8 s, where a message of an update may take 5 s."""
    config = small(
        tmp_path,
        dtype="float64",
        env="tests.train.slow:mpdqn-tests/Slow-v0",
        network="tests/train/network.py:make_network",
        frames=320,
        min_replay=200,
        timeout=5.0,
        log_every=1_000,
        **settings,
    )
    assert train(config).rows[-1]["updates"] == 30
