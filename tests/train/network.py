"""A network for the toy's small pictures."""

from __future__ import annotations

from torch import nn

from mpdqn.networks.scale import Scale


def make_network(observation_shape: tuple[int, int, int], num_actions: int) -> nn.Sequential:
    """[B, C, H, W] uint8 to [B, A]."""
    c, h, w = observation_shape
    return nn.Sequential(
        Scale(),
        nn.Conv2d(c, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * ((h - 1) // 2) * ((w - 1) // 2), num_actions),
    )
