"""Counted profiles: what the zoo's published counts say, and the same on every call."""

from __future__ import annotations

import pytest
import torch

from mpdqn.networks import count_macs, make_network
from mpdqn.partition import balance, counted_profile, profile
from mpdqn.partition.counted import MACS_PER_BYTE, MACS_PER_MS

FRAMES = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["nature", "impala", "resnet18"])
def test_forward_is_the_macs_and_the_bytes(name):
    network = make_network(name, (4, 84, 84), 6)
    counted = counted_profile(network, FRAMES)
    moved = sum(layer.boundary_bytes for layer in counted.layers) * MACS_PER_BYTE
    assert counted.forward_ms * MACS_PER_MS == pytest.approx(2 * count_macs(network, (4, 84, 84)) + moved)
    assert counted == counted_profile(network, FRAMES)


def test_bytes_names_and_gradients_are_those_that_measuring_sees():
    network = make_network("nature", (4, 84, 84), 6)
    counted, measured = counted_profile(network, FRAMES), profile(network, FRAMES, repeats=1, warmup=0)
    for a, b in zip(counted.layers, measured.layers, strict=True):
        assert (a.name, a.parameter_bytes, a.activation_bytes, a.boundary_bytes) == (
            b.name,
            b.parameter_bytes,
            b.activation_bytes,
            b.boundary_bytes,
        )
        assert (a.backward_weight_ms > 0) == (a.parameter_bytes > 0)
    first = counted.layers[1]  # the first convolution: the frames before it take no gradient
    assert (first.name, first.backward_input_ms) == ("conv1", 0.0)


def test_the_cut_of_a_resnet_is_near_its_middle():
    network = make_network("resnet18", (4, 84, 84), 6)
    counted = counted_profile(network, FRAMES)
    cut = balance(counted, 2, forward_passes=3)
    halves = [sum(counted.layers[k].forward_ms for k in cut.layers_of(j)) for j in (0, 1)]
    assert 0.4 < halves[0] / sum(halves) < 0.6
