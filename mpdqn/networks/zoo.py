"""The networks of the zoo by name."""

from __future__ import annotations

import difflib
import warnings
from typing import Any, get_args

from torch import nn

from mpdqn.networks.heads import Head
from mpdqn.networks.impala import Pooling, impala
from mpdqn.networks.initialization import initialize, keyed_draws
from mpdqn.networks.minatar import minatar
from mpdqn.networks.nature import nature
from mpdqn.networks.resnet import DEPTHS, resnet

NAMES = ("nature", "impala", "minatar", *(f"resnet{depth}" for depth in DEPTHS))


def make_network(
    name: str,
    observation_shape: tuple[int, int, int],
    num_actions: int,
    *,
    width: float | None = None,
    fc: int | None = None,
    pooling: Pooling | None = None,
    head: Head = "plain",
    noisy: bool = False,
    num_atoms: int = 1,
    branches: int = 0,
    seed: int = 0,
) -> nn.Sequential:
    """A network of the zoo on the CPU in float32: a flat chain of named layers, initialised by ``seed`` (`initialize`).

    It takes uint8 frames ``[B, C, H, W]``, scales them itself, and returns action values ``[B, num_actions]``, or what
    an agent needs in their place (`mpdqn.networks.heads`); ``agent.head_options()`` are ``head``, ``noisy``,
    ``num_atoms`` and ``branches``.

    Args:
        name: one of `NAMES`.
        observation_shape: ``(C, H, W)``.
        num_actions: number of actions.
        width: multiplier of IMPALA's channels; None is 1, as published.
        fc: units of the hidden layer; None is 512, 256 for IMPALA and 128 for minatar.
        pooling: what stands between IMPALA's convolutions and ``fc``, ``flatten`` or ``average``; None is the
            network's own, ``average`` in the ResNets and ``flatten`` elsewhere.
        head: ``plain`` or ``dueling``; the dueling head has a hidden layer of ``fc`` units in each of its streams.
        noisy: whether all linear layers are noisy (`NoisyLinear`).
        num_atoms: K logits for each action; 1 is one value.
        branches: D, for actions of D dimensions with ``num_actions`` choices each; 0 is one action without dimensions.
        seed: seed of the initialisation.

    Raises:
        ValueError: for an unknown name, an unknown option or one out of range, and frames the network can't take.

    Warns:
        UserWarning: about an option that has no effect on this network.
    """
    if name not in NAMES:
        raise ValueError(f"no network is called {name!r}{nearest(name, NAMES)}; the zoo has {', '.join(NAMES)}")
    check_shape(observation_shape, num_actions)
    if fc is not None and fc < 1:
        raise ValueError(f"fc is {fc} but the hidden layer needs at least 1 unit")
    options: dict[str, Any] = {"head": head, "noisy": noisy, "num_atoms": num_atoms, "branches": branches}
    options |= {} if fc is None else {"fc": fc}
    own_pooling = "average" if name.startswith("resnet") else "flatten"
    if name != "impala":
        if pooling not in (None, *get_args(Pooling)):
            raise ValueError(f"no pooling is called {pooling!r}; choose one of {', '.join(get_args(Pooling))}")
        if width is not None:
            warnings.warn(f"width={width} has no effect on {name}; only impala has a width", stacklevel=2)
        if pooling not in (None, own_pooling):
            warnings.warn(f"pooling={pooling!r} has no effect on {name}; its own is {own_pooling!r}", stacklevel=2)
    # the layers draw once as they are built: not from the caller's generator
    with keyed_draws("initialization", seed):
        if name == "nature":
            network = nature(observation_shape, num_actions, **options)
        elif name == "minatar":
            network = minatar(observation_shape, num_actions, **options)
        elif name == "impala":
            network = impala(
                observation_shape,
                num_actions,
                width=1.0 if width is None else width,
                pooling=pooling or "flatten",
                **options,
            )
        else:
            network = resnet(observation_shape, num_actions, depth=int(name.removeprefix("resnet")), **options)
    initialize(network, seed)
    return network


def check_shape(observation_shape: tuple[int, int, int], num_actions: int) -> None:
    """Raise ValueError unless the shape is three positive numbers and there is an action to choose."""
    if len(observation_shape) != 3 or min(observation_shape) < 1:
        raise ValueError(
            f"the observation shape is {tuple(observation_shape)} but must be (channels, height, width), each at "
            "least 1; stack frames along the channels"
        )
    if num_actions < 1:
        raise ValueError(f"num_actions is {num_actions} but must be at least 1")


def nearest(name: str, names: tuple[str, ...]) -> str:
    """The words that offer the likeliest of ``names`` for a misspelt ``name``; empty if none is alike."""
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    return f", did you mean {matches[0]!r}?" if matches else ""
