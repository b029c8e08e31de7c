"""That it learns: MinAtar's Breakout, far above random play, and the same way on every layout."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from mpdqn.train import TrainConfig, TrainResult, train


def learn(out: Path, **settings: object) -> TrainResult:
    """DQN with MinAtar's settings but twice the updates, each four times as long: learned in minutes."""
    config = TrainConfig(
        env="minatar-breakout",
        agent="dqn",
        frames=15_000,
        learning_rate=1e-3,
        replay_period=2,
        target_period=250,
        epsilon_decay_frames=8_000,
        evaluation_episodes=0,
        log_every=3_000,
        layout="single@1",
        out=out,
    )
    return train(config, **settings)


@pytest.mark.timeout(600)
def test_breakout_is_learned(tmp_path: Path) -> None:
    """Random play returns about 0.4; so did it where 15,000 frames of two seeds ended between 4.5 and 4.7."""
    result = learn(tmp_path)
    frames = [8 * (episode.step + 1) for episode in result.episodes]
    returns = [episode.episode_return for episode in result.episodes]
    at_random = fmean(r for frame, r in zip(frames, returns, strict=True) if frame <= 1_000)
    learned = fmean(r for frame, r in zip(frames, returns, strict=True) if frame > 12_500)
    assert at_random < 1
    assert learned > 2
    assert learned > 4 * at_random


@pytest.mark.matrix
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_learning_is_the_same_on_every_layout(lookahead: int, tmp_path: Path) -> None:
    """A thousand updates in float64 and every episode that they led to."""
    settings = {"dtype": "float64", "frames": 3_000, "lookahead": lookahead}
    alone = learn(tmp_path, **settings)
    assert len(alone.episodes) > 150
    for layout in ("dp2", "pp2-1f1b/m2", "dp2xpp2-1f1b/m2") if not lookahead else ("pp2-td1f1b/m2",):
        assert learn(tmp_path, layout=layout, **settings).episodes == alone.episodes, layout
