"""Human-normalised scores and their intervals, against rliable 1.2.0's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpdqn.environments.atari_games import ROMS
from mpdqn.scores import ATARI_57, Statistic, bootstrap_interval, human_normalized, iqm

SCORES = [
    [0.126, -0.132, 0.64, 0.105, -0.536, 0.362],
    [1.304, 0.947, -0.704, -1.265, -0.623, 0.041],
    [-2.325, -0.219, -1.246, -0.732, -0.544, -0.316],
    [0.412, 1.043, -0.129, 1.366, -0.665, 0.352],
    [0.903, 0.094, -0.743, -0.922, -0.458, 0.22],
]


@pytest.mark.parametrize(
    ("statistic", "estimate", "low", "high"),
    # rliable.library.get_interval_estimates(…, reps=50_000) of aggregate_iqm, aggregate_mean and aggregate_median
    [
        ("iqm", -0.145125, -0.3648, 0.1196),
        ("mean", -0.121467, -0.3925, 0.1359),
        ("median", -0.1028, -0.5229, 0.2204),
    ],
)
def test_the_numbers_of_rliable(statistic: Statistic, estimate: float, low: float, high: float) -> None:
    interval = bootstrap_interval(SCORES, statistic, resamples=20_000)
    assert interval.estimate == pytest.approx(estimate, abs=1e-6)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))


def test_the_runs_of_each_game_are_resampled_for_themselves() -> None:
    """Games far apart, runs alike: only a bootstrap across games would see any spread."""
    interval = bootstrap_interval([[0.0, 100.0], [0.0, 100.0]], "mean")
    assert (interval.low, interval.estimate, interval.high) == (50.0, 50.0, 50.0)


def test_one_games_episodes() -> None:
    episodes = [21.0, 20.0, 19.0, -21.0, 18.0, 20.0, 21.0, 17.0]
    assert iqm(episodes) == pytest.approx((18 + 19 + 20 + 20) / 4)
    assert bootstrap_interval(episodes, "median").estimate == 19.5
    interval = bootstrap_interval(episodes)
    assert interval == bootstrap_interval(episodes)
    assert interval.low < interval.estimate == iqm(episodes) < interval.high


def test_a_single_run_has_no_interval() -> None:
    interval = bootstrap_interval([[1.0, 3.0]], "mean")
    assert interval.estimate == 2.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], np.zeros((2, 2, 2))])
def test_what_is_no_matrix_of_scores(scores: object) -> None:
    with pytest.raises(ValueError, match=r"are no finite numbers \[runs, games\] or \[n\]"):
        bootstrap_interval(scores)  # type: ignore[arg-type]


def test_a_share_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"confidence is 95\.0"):
        bootstrap_interval([1.0, 2.0], confidence=95.0)


def test_human_normalized() -> None:
    assert human_normalized("pong", -20.7) == 0.0
    assert human_normalized("pong", 14.6) == 1.0
    assert human_normalized("breakout", 366.9) == pytest.approx(12.68, abs=0.005)  # CleanRL's Breakout
    assert math.isnan(human_normalized("minatar/breakout", 10.0))


def test_the_57_games() -> None:
    assert len(ATARI_57) == 57
    assert set(ATARI_57) <= set(ROMS)
