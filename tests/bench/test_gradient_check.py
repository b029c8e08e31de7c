"""The error that `compare` prints beside a layout."""

import math

import pytest
import torch

from mpdqn.bench.gradient_check import relative_error

ONE = {"w": torch.tensor([3.0, 4.0])}


def test_an_error_is_relative_to_the_reference() -> None:
    assert relative_error(ONE, ONE) == 0
    assert relative_error({"w": torch.tensor([3.0, 4.5])}, ONE) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({}, ONE),
        ({"v": ONE["w"]}, ONE),
        ({"w": torch.tensor([3.0])}, {"w": torch.full((3,), 3.0)}),  # which would be broadcast
        ({"w": torch.tensor([3.0, math.nan])}, ONE),
        ({"w": torch.tensor([3.0, math.inf])}, ONE),
        (ONE, {"w": torch.zeros(2)}),
        ({}, {}),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert relative_error(a, b) == math.inf
