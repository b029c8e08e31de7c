"""The MinAtar network (Young & Tian 2019, "MinAtar: An Atari-Inspired Testbed", section 3)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from mpdqn.networks.heads import Head, head_layers
from mpdqn.networks.scale import Scale

CHANNELS = 16
KERNEL = 3


def minatar(
    observation_shape: tuple[int, int, int], num_actions: int, *, fc: int = 128, head: Head = "plain", **options: Any
) -> nn.Sequential:
    """One 3×3 convolution to 16 channels and a hidden layer: uint8 ``[B, C, H, W]`` to floats ``[B, num_actions]``.

    A quarter of the units of the Nature network's last convolution and hidden layer; made for the 10×10 frames of
    MinAtar, whose channels tell kinds of objects apart. ``options`` are those of `head_layers`.

    Raises:
        ValueError: if the frames are smaller than the convolution needs.
    """
    channels, height, width = observation_shape
    if min(height, width) < KERNEL:
        raise ValueError(
            f"minatar needs frames of at least {KERNEL}×{KERNEL} pixels but got {height}×{width}; check that "
            f"{observation_shape} is (channels, height, width)"
        )
    features = CHANNELS * (height - KERNEL + 1) * (width - KERNEL + 1)
    layers: dict[str, nn.Module] = {
        "scale": Scale(),
        "conv": nn.Conv2d(channels, CHANNELS, KERNEL),
        "relu": nn.ReLU(),
        "flatten": nn.Flatten(),
    }
    return nn.Sequential(OrderedDict(layers | head_layers(head, features, fc, num_actions, **options)))
