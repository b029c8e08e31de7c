"""`Checkpointed` and `CloneViewOutput`: what they keep, and that they change no value."""

from __future__ import annotations

import torch
from torch import nn

from mpdqn.networks import make_network
from mpdqn.pipeline.recompute import Checkpointed, CloneViewOutput


def chain() -> nn.Sequential:
    return make_network("nature", (4, 44, 44), 5, fc=32, seed=3).double()[1:]


def frames() -> torch.Tensor:
    return torch.randn(3, 4, 44, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_checkpointed_layers_give_the_same_bits() -> None:
    found = []
    for wrapped in (False, True):
        layers = chain()
        x = frames().requires_grad_()
        output = (Checkpointed(layers) if wrapped else layers)(x)
        output.sin().sum().backward()
        found.append([output, x.grad, *(p.grad for p in layers.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointed_layers_keep_what_crosses_their_boundaries() -> None:
    """And what a later layer must find as it came is not written into."""
    layers, ran = chain(), []
    for name, layer in layers.named_children():
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    names = [name for name, _ in layers.named_children()]
    checkpointed = Checkpointed(layers)
    assert not any(getattr(part, "inplace", False) for part in layers.modules())
    output = checkpointed(frames())
    assert ran == names
    output.sum().backward()
    again = [name for name in reversed(names) if name != "flatten"]  # whose backward needs nothing
    assert ran == names + again, "each once more, when its own backward comes"


def test_owned_outputs_are_no_views() -> None:
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    flat = CloneViewOutput(nn.Flatten())(x)
    assert not flat._is_view()
    assert torch.equal(flat, x.flatten(1))
    relu = nn.ReLU()
    assert CloneViewOutput(relu)(x).grad_fn.name() == relu(x).grad_fn.name(), "no copy where there is none to make"
