"""The Nature DQN network (Mnih et al. 2015, "Human-level control through deep reinforcement learning", Methods)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from mpdqn.networks.heads import Head, head_layers
from mpdqn.networks.scale import Scale

# (output channels, kernel, stride) of the three unpadded convolutions
CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
SMALLEST = 36  # 36 -> 8 -> 3 -> 1 pixels


def nature(
    observation_shape: tuple[int, int, int], num_actions: int, *, fc: int = 512, head: Head = "plain", **options: Any
) -> nn.Sequential:
    """The Nature network for frames ``(C, H, W)``: uint8 ``[B, C, H, W]`` to floats ``[B, num_actions]``.

    ``options`` are those of `head_layers`.

    Raises:
        ValueError: if the frames are smaller than the three convolutions need.
    """
    channels, height, width = observation_shape
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"Nature needs frames of at least {SMALLEST}×{SMALLEST} pixels but got {height}×{width}; resize the "
            f"frames, choose impala or a resnet, which take any size, or check that {observation_shape} is "
            "(channels, height, width)"
        )
    layers: dict[str, nn.Module] = {"scale": Scale()}
    for index, (out_channels, kernel, stride) in enumerate(CONVOLUTIONS, start=1):
        layers[f"conv{index}"] = nn.Conv2d(channels, out_channels, kernel, stride)
        layers[f"relu{index}"] = nn.ReLU()
        channels = out_channels
        height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    layers["flatten"] = nn.Flatten()
    layers |= head_layers(head, channels * height * width, fc, num_actions, **options)
    return nn.Sequential(OrderedDict(layers))
