"""ε and the draws of ε-greedy exploration: named, never drawn in turn."""

import numpy as np
import pytest

from mpdqn.dqn.exploration import BLOCK, ExplorationDraws, LinearEpsilon


def test_epsilon_falls_linearly_and_then_stays():
    epsilon = LinearEpsilon(start=1.0, end=0.1, decay_frames=1000)
    assert epsilon(0) == 1.0
    assert epsilon(500) == pytest.approx(0.55)
    assert epsilon(1000) == pytest.approx(0.1)
    assert epsilon(10**9) == pytest.approx(0.1)
    assert LinearEpsilon(decay_frames=0)(0) == pytest.approx(0.1)


def test_an_environments_draws_depend_on_neither_its_neighbours_nor_the_order():
    """Environment 5 in one process for all and alone, forwards and backwards over two blocks and two episodes."""
    together = ExplorationDraws(seed=3, environments=[4, 5, 6], num_actions=6)
    alone = ExplorationDraws(seed=3, environments=[5], num_actions=6)
    moments = [(episode, step) for episode in (0, 1) for step in (0, 1, BLOCK - 1, BLOCK, BLOCK + 7)]

    def draw(draws: ExplorationDraws, place: int, n: int, episode: int, step: int) -> tuple[float, int]:
        threshold, action = draws.draw(np.full(n, episode), np.full(n, step))
        return threshold[place], action[place]

    forwards = [draw(together, 1, 3, *moment) for moment in moments]
    backwards = [draw(alone, 0, 1, *moment) for moment in reversed(moments)]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == len(moments)


def test_the_draws_are_uniform():
    draws = ExplorationDraws(seed=0, environments=range(40), num_actions=4)
    drawn = [draws.draw(np.zeros(40, dtype=np.int64), np.full(40, step)) for step in range(250)]
    thresholds, actions = np.concatenate([d[0] for d in drawn]), np.concatenate([d[1] for d in drawn])
    assert 0 <= thresholds.min() <= thresholds.max() < 1
    # 10,000 draws: five standard errors
    assert thresholds.mean() == pytest.approx(0.5, abs=5 * 12**-0.5 / 100)
    assert np.bincount(actions, minlength=4) / 10_000 == pytest.approx([0.25] * 4, abs=5 * 0.433 / 100)


def test_other_seeds_draw_other_numbers():
    first, second = (ExplorationDraws(seed=s, environments=[0], num_actions=4) for s in (0, 1))
    moment = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    assert first.draw(*moment)[0] != second.draw(*moment)[0]
