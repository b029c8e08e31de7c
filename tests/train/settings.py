"""Small runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpdqn.train import TrainConfig


def small(out: Path, **settings: Any) -> TrainConfig:
    """MinAtar's Breakout for 1,600 frames of eight environments, of which 1,100 are learned from."""
    base: dict[str, Any] = {
        "env": "minatar-breakout",
        "layout": "single@1",
        "frames": 1_600,
        "min_replay": 500,
        "capacity": 1_000,
        "epsilon_decay_frames": 1_000,
        "learning_rate": 1e-3,
        "target_period": 50,
        "evaluation_episodes": 0,
        "out": out,
    }
    if settings.get("agent") == "rainbow":  # it has no ε
        del base["epsilon_decay_frames"]
    return TrainConfig(**base | settings)
