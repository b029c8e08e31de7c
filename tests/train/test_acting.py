"""Acting with weights that are a known number of rounds old."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpdqn.train.acting import LaggedWeights


def delivered(lag: int, deliveries: list[float | None]) -> list[float]:
    """What a network of one weight, at first 0, is after each delivery."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    weights = LaggedWeights(network, lag)
    seen = []
    for value in deliveries:
        weights.deliver(None if value is None else {"weight": torch.tensor([[value]])})
        seen.append(network.weight.item())
    return seen


@pytest.mark.parametrize(
    ("lag", "expected"),
    [(0, [1.0, 2.0, 2.0, 3.0]), (1, [1.0, 2.0, 2.0, 3.0]), (2, [0.0, 1.0, 2.0, 2.0]), (3, [0.0, 0.0, 1.0, 2.0])],
)
def test_weights_wait_for_their_turn(lag: int, expected: list[float]) -> None:
    """With a lag of 1 a chunk starts a round early: what is delivered then is one round old by itself."""
    assert delivered(lag, [1.0, 2.0, None, 3.0]) == expected
