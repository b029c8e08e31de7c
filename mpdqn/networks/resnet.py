"""ResNet-18, 34, 50 and 101 (He et al. 2015, "Deep Residual Learning", Table 1) with GroupNorm (Wu & He 2018).

    stem: conv 7×7/2 ─ norm ─ relu ─ max-pool 3×3/2      four stages of blocks      average pool ─ fc ─ relu ─ head

BatchNorm would make an update depend on how the batch is cut into micro-batches; GroupNorm looks at one frame at a
time. Unlike the ImageNet network, one hidden layer stands before the action values, as in the other Q-networks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mpdqn.networks.heads import Head, head_layers
from mpdqn.networks.scale import Scale

NORM_GROUPS = 32  # Wu & He 2018, Table 3
STAGE_CHANNELS = (64, 128, 256, 512)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    # no bias: the norm that follows every convolution has one
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(OrderedDict(conv=_conv(in_channels, out_channels, 1, stride), norm=_norm(out_channels)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the shortcut around them (He et al. 2015, Figure 5 left).

    Input: floats ``[B, in_channels, H, W]``. Output: ``[B, channels, ⌈H/stride⌉, ⌈W/stride⌉]``.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.norm1 = _norm(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.norm2 = _norm(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output; ``x`` itself stays as it is."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and the shortcut around them (He et al. 2015, Figure 5 right).

    The stride is in the 3×3 convolution, as in every current implementation; the paper has it in the first 1×1.

    Input: floats ``[B, in_channels, H, W]``. Output: ``[B, 4·channels, ⌈H/stride⌉, ⌈W/stride⌉]``.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = _conv(in_channels, channels, 1)
        self.norm1 = _norm(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.norm2 = _norm(channels)
        self.conv3 = _conv(channels, out_channels, 1)
        self.norm3 = _norm(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output; ``x`` itself stays as it is."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        return F.relu(self.norm3(self.conv3(hidden)) + self.shortcut(x))


# depth: (block, blocks in each of the four stages), He et al. 2015, Table 1
DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


def resnet(
    observation_shape: tuple[int, int, int],
    num_actions: int,
    *,
    depth: int,
    fc: int = 512,
    head: Head = "plain",
    **options: Any,
) -> nn.Sequential:
    """ResNet-``depth`` for frames ``(C, H, W)`` of any size: uint8 ``[B, C, H, W]`` to floats ``[B, num_actions]``.

    ``options`` are those of `head_layers`.

    Raises:
        ValueError: if ``depth`` isn't 18, 34, 50 or 101.
    """
    if depth not in DEPTHS:
        raise ValueError(f"no ResNet has depth {depth}; choose one of {', '.join(map(str, DEPTHS))}")
    block, stage_depths = DEPTHS[depth]
    channels = STAGE_CHANNELS[0]
    layers: dict[str, nn.Module] = {
        "scale": Scale(),
        "stem_conv": _conv(observation_shape[0], channels, 7, stride=2),
        "stem_norm": _norm(channels),
        "stem_relu": nn.ReLU(),
        "stem_pool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    for stage, (stage_channels, blocks) in enumerate(zip(STAGE_CHANNELS, stage_depths, strict=True), start=1):
        for index in range(1, blocks + 1):
            stride = 2 if stage > 1 and index == 1 else 1
            layers[f"stage{stage}_block{index}"] = block(channels, stage_channels, stride)
            channels = block.expansion * stage_channels
    layers["average_pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers |= head_layers(head, channels, fc, num_actions, **options)
    return nn.Sequential(OrderedDict(layers))
