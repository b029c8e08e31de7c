"""A run is the same run on every layout: its episodes, bit by bit in float64, whoever acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpdqn.train import TrainResult, train
from tests.train.settings import small

pytestmark = pytest.mark.timeout(600)


def run(out: Path, **settings: Any) -> TrainResult:
    return train(small(out, dtype="float64", **settings))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(tmp_path_factory.mktemp("alone"))


def same(a: TrainResult, b: TrainResult) -> None:
    assert len(a.episodes) > 50
    assert a.episodes == b.episodes
    assert a.rows[-1]["updates"] == b.rows[-1]["updates"] == 275
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-8)


@pytest.mark.parametrize("layout", ["dp2", "pp2-1f1b/m2", "pp2-td1f1b/m2", "dp2xpp2-1f1b/m2"])
def test_every_layout_plays_the_episodes_of_one_process(layout: str, alone: TrainResult, tmp_path: Path) -> None:
    lookahead = 1 if "td1f1b" in layout else 0
    reference = run(tmp_path / "alone", lookahead=1) if lookahead else alone
    same(run(tmp_path, layout=layout, lookahead=lookahead), reference)


def test_so_does_prioritised_rainbow_with_lookahead_and_a_lag(tmp_path: Path) -> None:
    settings = {"agent": "rainbow", "lookahead": 1, "prefetch": 1, "actor_lag": 1, "min_replay": 500}
    reference = run(tmp_path / "alone", **settings)
    same(run(tmp_path, layout="dp2", **settings), reference)
    same(run(tmp_path, layout="pp2-td1f1b/m2", **settings), reference)


@pytest.mark.parametrize("lag", [0, 2])
def test_acting_ranks_play_what_the_learners_would(lag: int, alone: TrainResult, tmp_path: Path) -> None:
    reference = run(tmp_path / "alone", actor_lag=lag) if lag else alone
    same(run(tmp_path, layout="pp2-1f1b/m2", actors="workers", actor_lag=lag), reference)


@pytest.mark.parametrize("settings", [{"layout": "pp2-1f1b/m2"}, {"actors": "workers", "round_steps": 20}])
def test_simulators_may_take_longer_than_messages(settings: dict[str, Any], tmp_path: Path) -> None:
    """Filling replay takes 10 s and a chunk of twenty steps 8 s, where a message of an update may take 5 s."""
    result = run(
        tmp_path,
        env="tests.train.slow:mpdqn-tests/Slow-v0",
        network="tests/train/network.py:make_network",
        frames=320,
        min_replay=200,
        timeout=5.0,
        log_every=1_000,
        **settings,
    )
    assert result.rows[-1]["updates"] == 30
