"""How large a network is: its parameters, and the multiply-accumulates of one frame."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn


def count_parameters(network: nn.Module) -> int:
    """Number of trainable and frozen weights; a weight that two layers share counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, observation_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one frame ``(C, H, W)`` in convolutions and linear layers.

    Biases, norms, activations and pooling aren't counted, as in the tables of the papers. One frame is sent through
    the network on its own device; a network built under ``torch.device("meta")`` is counted without computing.
    """
    total = 0

    def add(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal total
        # each output number is one dot product with the weights of its channel
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        total += output.numel() * math.prod(weight.shape[1:])

    hooks = [
        layer.register_forward_hook(add)
        for layer in network.modules()
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    first = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
    try:
        with torch.no_grad():
            network(torch.zeros(1, *observation_shape, dtype=torch.uint8, device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
    return total
