"""What each layer costs: time, parameters, activations, and the bytes that cross a cut after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpdqn.plan import Profile

if TYPE_CHECKING:
    from torch import Tensor, nn


def profile(
    model: nn.Sequential,
    example: Tensor,
    *,
    name: str = "network",
    repeats: int = 5,
    warmup: int = 2,
    threads: int | None = None,
    accumulate: bool = False,
) -> Profile:
    """Measure every layer of the flat ``model`` on the batch ``example``, on the device that holds both.

    ``example`` is what the first layer takes, [B, C, H, W] uint8 for a Q-network on frames; each later layer gets what
    its predecessor really computed. Times are medians in ms over ``repeats`` rounds after ``warmup`` rounds, on
    ``threads`` threads (None: as many as torch uses now). A layer's forward time is that of a training step, recording
    for the backward pass included; its two backward times add up to the time of its full backward pass, with
    ``accumulate`` including the addition to an earlier gradient, as every micro-batch but the first does. Both are 0
    where the training step computes nothing: frames take no gradient, so the first layer has no backward-input.

    Parameters, gradients, buffers, random state and modes of the model, and torch's thread count, are as before.

    Raises:
        TypeError: if ``model`` is no flat `nn.Sequential`, or a layer returns anything but one tensor.
        ValueError: if a count is out of range, the example is empty or on another device than the model, or a layer
            hides the gradient of its input.
    """
    import torch
    from torch import nn

    from mpdqn.partition import measure

    if not isinstance(model, nn.Sequential):
        raise TypeError(
            f"{type(model).__name__} cannot be profiled by layer; write it as a flat torch.nn.Sequential of its layers"
        )
    for count, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise ValueError(f"{count} is {value} but must be at least {least}")
    if example.numel() == 0:
        raise ValueError(f"the example has shape {list(example.shape)}; give a batch of at least 1 observation")
    for parameter_name, parameter in model.named_parameters():
        if parameter.device != example.device:
            raise ValueError(
                f"the example is on {example.device} but {parameter_name!r} on {parameter.device}; move one of them"
            )
    with measure.as_before(model, example.device, threads):
        layers = measure.layer_costs(model, example.detach(), repeats=repeats, warmup=warmup, accumulate=accumulate)
        return Profile(
            network=name,
            batch_size=example.shape[0],
            device=measure.device_name(example.device),
            threads=torch.get_num_threads(),
            memory_format=measure.memory_format(model),
            layers=layers,
        )
