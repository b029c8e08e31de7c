from decimal import Decimal

import pytest
import torch
from torch import nn

from mpdqn.networks import count_macs, count_parameters, make_network

# (network, options, millions of parameters, millions of multiply-accumulates per frame), as REFERENCE.md prints them
ROWS = [
    ("nature", {}, "1.69", "9.4"),
    ("impala", {}, "1.09", "54"),
    ("impala", {"width": 2}, "2.38", "207"),
    ("impala", {"width": 4}, "5.52", "807"),
    ("impala", {"width": 4, "fc": 2048}, "33.31", "835"),
    ("impala", {"width": 4, "pooling": "average"}, "1.59", "803"),
    ("impala", {"width": 8}, "14.1", "3187"),
    ("impala", {"width": 16}, "40.7", "12668"),
    ("resnet18", {}, "11.45", "302"),
    ("resnet34", {}, "21.56", "618"),
    ("resnet50", {}, "24.57", "689"),
    ("resnet101", {}, "43.56", "1371"),
]


def as_printed(number: int, like: str) -> str:
    """``number`` in millions with the decimals of ``like``."""
    return str((Decimal(number) / 10**6).quantize(Decimal(like)))


def test_the_minatar_network_has_the_sizes_of_its_paper() -> None:
    """16 filters of 3×3, 128 hidden units, on 10×10 frames of 4 channels; a quarter of the last layers of Nature."""
    network = make_network("minatar", (4, 10, 10), 6)
    hidden, outputs = 16 * 8 * 8 * 128, 128 * 6
    assert count_parameters(network) == (16 * 4 * 9 + 16) + (hidden + 128) + (outputs + 6)
    assert count_macs(network, (4, 10, 10)) == 16 * 4 * 9 * 64 + hidden + outputs


def test_a_noisy_layer_counts_its_means_and_its_sigmas() -> None:
    plain, noisy = (make_network("minatar", (4, 10, 10), 6, noisy=noisy) for noisy in (False, True))
    assert count_macs(noisy, (4, 10, 10)) == count_macs(plain, (4, 10, 10))
    linear = sum(p.numel() for name, p in plain.named_parameters() if not name.startswith("conv"))
    assert count_parameters(noisy) == count_parameters(plain) + linear


@pytest.mark.parametrize(("name", "options", "parameters", "macs"), ROWS)
def test_every_row_of_the_reference_table(name: str, options: dict[str, int], parameters: str, macs: str) -> None:
    with torch.device("meta"):
        network = make_network(name, (4, 84, 84), 18, **options)
    assert as_printed(count_parameters(network), parameters) == parameters
    assert as_printed(count_macs(network, (4, 84, 84)), macs) == macs


def test_a_real_network_counts_as_on_the_meta_device() -> None:
    with torch.device("meta"):
        expected = count_macs(make_network("nature", (4, 84, 84), 18), (4, 84, 84))
    assert count_macs(make_network("nature", (4, 84, 84), 18), (4, 84, 84)) == expected


def test_macs_of_a_network_counted_by_hand() -> None:
    network = nn.Sequential(
        make_network("nature", (4, 36, 36), 1).scale,
        nn.Conv2d(4, 6, 3, groups=2),  # 34·34 pixels, 6 channels, 9·2 weights each
        nn.Flatten(),
        nn.Linear(34 * 34 * 6, 2),
    )
    assert count_macs(network, (4, 36, 36)) == 34 * 34 * 6 * 18 + 34 * 34 * 6 * 2
    assert not any(layer._forward_hooks for layer in network)


def test_a_shared_parameter_counts_once() -> None:
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12


def test_hooks_are_removed_when_the_forward_fails() -> None:
    network = make_network("nature", (4, 84, 84), 1)
    with pytest.raises(RuntimeError):
        count_macs(network, (4, 40, 40))
    assert not any(layer._forward_hooks for layer in network)
