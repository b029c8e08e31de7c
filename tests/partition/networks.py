"""Small networks for the tests of this folder."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """Frames as numbers between 0 and 1, in the dtype of the network."""

    maximum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("maximum", torch.tensor(255.0))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.maximum


def small_network(inplace: bool = False) -> nn.Sequential:
    """[B, 1, 5, 5] uint8 to [B, 3]."""
    layers: list[tuple[str, nn.Module]] = [
        ("scale", Scale()),
        ("conv", nn.Conv2d(1, 2, 3)),
        ("relu", nn.ReLU(inplace)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(18, 3)),
    ]
    return nn.Sequential(OrderedDict(layers))
