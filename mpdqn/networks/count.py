"""How large a network is: its parameters, and the multiply-accumulates of one frame."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn

WEIGHTED = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def count_parameters(network: nn.Module) -> int:
    """Number of trainable and frozen weights; a weight that two layers share counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, observation_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one frame ``(C, H, W)`` in convolutions and linear layers.

    Biases, norms, activations and pooling aren't counted, as in the tables of the papers. One frame is sent through
    the network on its own device; a network built under ``torch.device("meta")`` is counted without computing.
    """
    first = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
    frame = torch.zeros(1, *observation_shape, dtype=torch.uint8, device=first.device)
    return sum(count_layer_macs(nn.Sequential(network), frame))


@torch.no_grad()
def count_layer_macs(network: nn.Sequential, frames: torch.Tensor) -> list[int]:
    """Multiply-accumulates of each layer of a chain on the batch ``frames`` [B, C, H, W], see `count_macs`."""
    counts: list[int] = []

    def add(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        # each output number is one dot product with the weights of its channel
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        counts[-1] += output.numel() * math.prod(weight.shape[1:])

    hooks = [layer.register_forward_hook(add) for layer in network.modules() if isinstance(layer, WEIGHTED)]
    x = frames
    try:
        for layer in network:
            counts.append(0)
            x = layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
