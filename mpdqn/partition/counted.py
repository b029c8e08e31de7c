"""What each layer costs by counting: the same profile on every machine and in every run, where measuring gives another.

A layer's forward takes a millisecond for each gigaflop of multiply-accumulates, and each half of its backward as long
again. Layers that only move memory take what their output's bytes are worth. Bytes are seen, as `profile` sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpdqn.plan import LayerCost, Profile

if TYPE_CHECKING:
    from torch import Tensor, nn

MACS_PER_MS = 1e9
MACS_PER_BYTE = 2.0
"""An output byte that is written and read again, in the time of so many multiply-accumulates."""


def counted_profile(model: nn.Sequential, example: Tensor, *, name: str = "network") -> Profile:
    """The layer costs of the flat ``model`` on the batch ``example`` ([B, C, H, W] uint8), counted and not timed.

    One forward pass of ``example`` is made, for the shapes. A cut that follows from counts is the same in every run of
    a seed, so that the run is bit-reproducible: the order in which a norm over all stages is summed depends on it.
    """
    import torch

    from mpdqn.networks import count_layer_macs
    from mpdqn.partition import measure

    with measure.as_before(model, example.device, None):
        activations, boundaries = measure.layer_bytes(model, example)
        macs = count_layer_macs(model, example)
    layers = []
    gradient = False  # frames take no gradient: the first layers with parameters have no backward-input
    for k, (layer_name, layer) in enumerate(measure.named_layers(model).items()):
        forward = (macs[k] + MACS_PER_BYTE * boundaries[k]) / MACS_PER_MS
        trained = any(p.requires_grad for p in layer.parameters())
        layers.append(
            LayerCost(
                name=layer_name,
                forward_ms=forward,
                backward_input_ms=forward if gradient else 0.0,
                backward_weight_ms=forward if trained else 0.0,
                parameter_bytes=sum(p.numel() * p.element_size() for p in layer.parameters()),
                activation_bytes=activations[k],
                boundary_bytes=boundaries[k],
            )
        )
        gradient = gradient or trained
    return Profile(
        network=name,
        batch_size=example.shape[0],
        device=measure.device_name(example.device),
        threads=torch.get_num_threads(),
        memory_format=measure.memory_format(model),
        layers=tuple(layers),
    )
