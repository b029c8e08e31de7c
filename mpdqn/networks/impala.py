"""The large IMPALA network (Espeholt et al. 2018, "IMPALA", Figure 3 right), at any width.

three times:  section_conv 3×3 ─ section_pool 3×3/2 ─ block1 ─ block2        then  relu ─ flatten ─ fc ─ relu ─ head

block:  x ─┬─ relu ─ conv1 ─ relu ─ conv2 ─ + ─▶       one layer: between layers only one tensor passes
           └────────────────────────────────┘
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from mpdqn.networks.heads import Head, head_layers
from mpdqn.networks.scale import Scale

SECTION_CHANNELS = (16, 32, 32)

Pooling = Literal["flatten", "average"]


class ImpalaBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))) with 3×3 convolutions; ``[B, C, H, W]`` to the same shape and dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, of the shape of ``x``; ``x`` itself stays as it is."""
        hidden = self.conv1(F.relu(x))
        residual: torch.Tensor = self.conv2(F.relu(hidden))
        return x + residual


def impala(
    observation_shape: tuple[int, int, int],
    num_actions: int,
    *,
    width: float = 1.0,
    fc: int = 256,
    pooling: Pooling = "flatten",
    head: Head = "plain",
    **options: Any,
) -> nn.Sequential:
    """IMPALA ×``width`` for frames ``(C, H, W)`` of any size: uint8 ``[B, C, H, W]`` to floats ``[B, num_actions]``.

    The channels 16, 32, 32 are multiplied by ``width`` and rounded, to 1 at least. ``pooling="average"`` averages each
    channel over the image before ``fc``, as Impoola does (Trumpp et al. 2025), which makes ``fc`` independent of the
    image size.

    Raises:
        ValueError: if ``width`` isn't a positive number, or ``pooling`` is neither ``flatten`` nor ``average``.
    """
    if not 0 < width < math.inf:
        raise ValueError(f"width is {width} but must be a positive number; 1 is the published network")
    if pooling not in get_args(Pooling):
        raise ValueError(f"no pooling is called {pooling!r}; choose one of {', '.join(get_args(Pooling))}")
    channels, rows, columns = observation_shape
    layers: dict[str, nn.Module] = {"scale": Scale()}
    for index, base in enumerate(SECTION_CHANNELS, start=1):
        out_channels = max(1, round(base * width))
        section = f"section{index}"
        layers[f"{section}_conv"] = nn.Conv2d(channels, out_channels, 3, padding=1)
        layers[f"{section}_pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        layers[f"{section}_block1"] = ImpalaBlock(out_channels)
        layers[f"{section}_block2"] = ImpalaBlock(out_channels)
        channels, rows, columns = out_channels, math.ceil(rows / 2), math.ceil(columns / 2)
    layers["relu"] = nn.ReLU()
    if pooling == "average":
        layers["average_pool"] = nn.AdaptiveAvgPool2d(1)
        rows = columns = 1
    layers["flatten"] = nn.Flatten()
    layers |= head_layers(head, channels * rows * columns, fc, num_actions, **options)
    return nn.Sequential(OrderedDict(layers))
