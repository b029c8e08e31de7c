import copy

import pytest
import torch
from torch import nn

from mpdqn.networks import choose_memory_format, make_network, set_memory_format
from mpdqn.networks import memory_format as memory_format_module

SHAPE = (4, 44, 44)


def frames() -> torch.Tensor:
    return torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def formats(network: nn.Sequential, x: torch.Tensor) -> dict[str, tuple[bool, bool]]:
    """Of each output that is an image with several channels and pixels: (is contiguous, is channels_last)."""
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, y, name=name: seen.update(
                {name: (y.is_contiguous(), y.is_contiguous(memory_format=torch.channels_last))}
                if y.dim() == 4 and min(y.shape[1:]) > 1
                else {}
            )
        )
        for name, layer in network.named_modules()
        if name
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["nature", "impala", "resnet18", "resnet50"])
def test_channels_last_reaches_every_layer_and_changes_no_value(name: str) -> None:
    network = make_network(name, SHAPE, 5, fc=16)
    expected = network(frames())
    expected.square().sum().backward()
    other = copy.deepcopy(network)
    other.zero_grad()
    set_memory_format(other, "channels_last")
    seen = formats(other, frames())
    assert {"scale", next(key for key in seen if "conv" in key)} <= set(seen)
    assert all(channels_last and not contiguous for contiguous, channels_last in seen.values())
    assert all(contiguous for contiguous, _ in formats(network, frames()).values())
    values = other(frames())
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    values.square().sum().backward()
    for ours, theirs in zip(other.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_torchs_own_conversion_reaches_the_scale_layer_too() -> None:
    network = make_network("impala", SHAPE, 5).to(memory_format=torch.channels_last)
    assert all(channels_last for _, channels_last in formats(network, frames()).values())


def test_the_format_can_be_set_back_and_parameters_stay_the_same_objects() -> None:
    network = make_network("impala", SHAPE, 5)
    before = list(network.parameters())
    set_memory_format(network, "channels_last")
    set_memory_format(network, "contiguous")
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert all(contiguous for contiguous, _ in formats(network, frames()).values())


def test_a_stage_keeps_the_format() -> None:
    network = make_network("impala", SHAPE, 5)
    set_memory_format(network, "channels_last")
    assert network[:4](frames()).is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="no memory format is called 'nhwc'; choose one of contiguous, channels_last"):
        set_memory_format(nn.Conv2d(1, 1, 1), "nhwc")


def test_choosing_leaves_the_network_alone() -> None:
    network = make_network("impala", SHAPE, 5, width=0.5)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    chosen = choose_memory_format(network, frames(), repeats=1)
    assert chosen in ("contiguous", "channels_last")
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert all(parameter.is_contiguous() and parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("contiguous", "channels_last", "expected"),
    [(1.0, 0.5, "channels_last"), (1.0, 0.97, "channels_last"), (1.0, 0.99, "contiguous"), (1.0, 2.0, "contiguous")],
)
def test_the_faster_median_wins_and_a_tie_stays_contiguous(
    monkeypatch: pytest.MonkeyPatch, contiguous: float, channels_last: float, expected: str
) -> None:
    order = []

    def seconds(network: nn.Module, example: torch.Tensor) -> float:
        last = network.section1_conv.weight.is_contiguous(memory_format=torch.channels_last)
        order.append(last)
        if len(order) in (1, 2, 3, 4):  # the warm-up and a disturbed first round
            return 100.0 * (2 - last)
        return channels_last if last else contiguous

    monkeypatch.setattr(memory_format_module, "_seconds", seconds)
    assert choose_memory_format(make_network("impala", SHAPE, 5), frames()) == expected
    assert order == [False, True] * 4  # interleaved


def test_measuring_needs_a_round() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        choose_memory_format(nn.Identity(), frames(), repeats=0)
