"""Initialisation keyed by name: a weight depends on the seed, its layer's name and its shape, on nothing else.

A stage that builds only its own layers, or builds them in another order, therefore starts from the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from mpdqn.randomness import keyed_seed


@contextlib.contextmanager
def keyed_draws(*key: str | int) -> Iterator[None]:
    """Within this context the CPU generator draws the stream that ``key`` names; afterwards it is where it was."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would reseed the generators of all accelerators too, and leave them so
        torch.default_generator.manual_seed(keyed_seed(*key))
        yield


def initialize(network: nn.Module, seed: int) -> None:
    """Draw the weights of ``network`` anew, in place, by each layer's own ``reset_parameters``.

    Layer ``name`` draws from the stream ("initialization", ``seed``, ``name``). A layer without ``reset_parameters``
    keeps what it has. Initialise in the dtype that is to be compared: float64 draws differ from float32 ones, whereas
    ``network.double()`` after the initialisation keeps the numbers.

    Raises:
        ValueError: if a parameter is on an accelerator, whose generator would draw other numbers.
    """
    for name, parameter in network.named_parameters():
        if parameter.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {parameter.device}; initialise on the CPU, then move the network")
    for name, layer in network.named_modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            with keyed_draws("initialization", seed, name):
                reset()
