"""Scores: human-normalised, and what Agarwal et al. 2021 ("rliable") recommend to report of few runs.

The interquartile mean (IQM) is the mean of the middle half; its interval comes from resampling the runs of every game
for itself (a *stratified* bootstrap), since the games of a benchmark are given and only the runs are drawn.

            game 1  game 2  …
    run 1      0.9     0.2        ─▶ IQM, mean or median of runs × games
    run 2      1.1     0.1        ─▶ interval: each column resampled with replacement, percentiles of the statistic
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Literal["iqm", "mean", "median"]

# Returns of a random agent and of a human tester on episodes that begin with up to 30 no-ops: Wang et al. 2016
# (arXiv:1511.06581), as DeepMind's dqn_zoo lists them (dqn_zoo/atari_data.py). Cross-checked with CleanRL's table and
# that of Google Research's BBF: the same, but for the random score of video_pinball, which BBF has as 0. Mnih et al.
# 2015 had other testers and other scores (Alien: 6,875).
_RANDOM_AND_HUMAN = {
    "alien": (227.8, 7127.7),
    "amidar": (5.8, 1719.5),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7),
    "atlantis": (12850.0, 29028.1),
    "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37187.5),
    "beam_rider": (363.9, 16926.5),
    "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7),
    "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5),
    "centipede": (2090.9, 12017.0),
    "chopper_command": (811.0, 7387.8),
    "crazy_climber": (10780.5, 35829.4),
    "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971.0),
    "double_dunk": (-18.6, -16.4),
    "enduro": (0.0, 860.5),
    "fishing_derby": (-91.7, -38.7),
    "freeway": (0.0, 29.6),
    "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4),
    "hero": (1027.0, 30826.4),
    "ice_hockey": (-11.2, 0.9),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2665.5),
    "kung_fu_master": (258.5, 22736.3),
    "montezuma_revenge": (0.0, 4753.3),
    "ms_pacman": (307.3, 6951.6),
    "name_this_game": (2292.3, 8049.0),
    "phoenix": (761.4, 7242.6),
    "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0),
    "riverraid": (1338.5, 17118.0),
    "road_runner": (11.5, 7845.0),
    "robotank": (2.2, 11.9),
    "seaquest": (68.4, 42054.7),
    "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7),
    "space_invaders": (148.0, 1668.7),
    "star_gunner": (664.0, 10250.0),
    "surround": (-10.0, 6.5),
    "tennis": (-23.8, -8.3),
    "time_pilot": (3568.0, 5229.2),
    "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2),
    "venture": (0.0, 1187.5),
    "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5),
    "yars_revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}

ATARI_57 = tuple(_RANDOM_AND_HUMAN)
"""The games that have a human score, by their ROM's name."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic and its percentile bootstrap interval; ``low`` and ``high`` are NaN if a game has a single run."""

    estimate: float
    low: float
    high: float


def human_normalized(game: str, score: float) -> float:
    """``score`` of the ROM ``game`` on the scale on which a random agent has 0 and the human tester 1.

    Returns:
        NaN for an environment that nobody measured a human on: one of Atari's other games, or none of Atari's.
    """
    if game not in _RANDOM_AND_HUMAN:
        return float("nan")
    random, human = _RANDOM_AND_HUMAN[game]
    return (score - random) / (human - random)


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean: the mean of n scores without the ⌊n/4⌋ smallest and the ⌊n/4⌋ largest.

    ``scores`` are floats of any shape: runs × games are thrown together, as rliable does.
    """
    from scipy.stats import trim_mean

    return float(trim_mean(scores, 0.25, axis=None))


def bootstrap_interval(
    scores: ArrayLike,
    statistic: Statistic = "iqm",
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """A statistic of runs × games, or of one game's episodes, with its stratified percentile interval.

    Args:
        scores: float [runs, games], human-normalised; or [n], the runs or the episodes of one game.
        statistic: ``iqm`` and ``mean`` are those of all scores; ``median`` is that of the games' means, or of the n.
        confidence: share of the resampled statistics inside the interval.
        resamples: how many are drawn.
        seed: of the draws: the same scores have the same interval.

    Raises:
        ValueError: if there is no score, one is not finite, or ``confidence`` is not inside (0, 1).
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim not in (1, 2) or matrix.size == 0 or not np.isfinite(matrix).all():
        raise ValueError(
            f"scores of shape {matrix.shape} are no finite numbers [runs, games] or [n]; leave out what has none"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but an interval holds a share in (0, 1); try 0.95")
    columns = tuple(matrix.T) if matrix.ndim == 2 else (matrix,)
    aggregate = functools.partial(_aggregate, statistic=statistic, axis=-1)
    estimate = float(aggregate(*columns))
    if len(matrix) < 2:
        return Interval(estimate=estimate, low=float("nan"), high=float("nan"))
    from scipy.stats import bootstrap  # 0.8 s to import, which no worker of a run has to wait for

    # rliable 1.2.0 no longer imports beside pandas 3 (it pins arch below 8). scipy's bootstrap of several samples is
    # the same stratified one, its trim_mean the same IQM: tests/test_scores.py holds rliable's own numbers.
    # Not the default BCa: it divides by zero where all runs of a game are alike, and rliable takes percentiles too.
    interval = bootstrap(
        columns,
        functools.partial(_aggregate, statistic=statistic),
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        paired=False,  # each game's runs are drawn for themselves: this is the stratification
        batch=200,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate=estimate, low=float(interval.low), high=float(interval.high))


def _aggregate(*columns: NDArray[np.float64], statistic: Statistic, axis: int) -> Any:
    """The statistic of one array for each game, its runs along ``axis``."""
    if statistic == "median" and len(columns) > 1:
        return np.median([column.mean(axis=axis) for column in columns], axis=0)
    scores = np.concatenate(columns, axis=axis)
    if statistic == "iqm":
        from scipy.stats import trim_mean

        return trim_mean(scores, 0.25, axis=axis)
    return np.mean(scores, axis=axis) if statistic == "mean" else np.median(scores, axis=axis)
