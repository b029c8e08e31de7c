"""Contiguous or channels_last: set it for a network, or let a measurement choose it."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Literal, get_args

import torch
from torch import nn

MemoryFormat = Literal["contiguous", "channels_last"]

TIE = 0.02  # a gain below 2 % is noise on a shared machine


def set_memory_format(network: nn.Module, memory_format: MemoryFormat) -> None:
    """Bring the weights of ``network`` into the named format, in place, and its `Scale` layer with them.

    The convolutions follow their weights and the other layers their input, so that the whole network computes in the
    format, whatever the layout of the frames. It can be set at any time: parameters stay the same objects.

    Raises:
        ValueError: if there is no such format.
    """
    if memory_format not in get_args(MemoryFormat):
        raise ValueError(
            f"no memory format is called {memory_format!r}; choose one of {', '.join(get_args(MemoryFormat))}"
        )
    torch_format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    network.to(memory_format=torch_format)


def choose_memory_format(network: nn.Module, example: torch.Tensor, *, repeats: int = 3) -> MemoryFormat:
    """The format in which forward and backward of ``network`` on ``example`` take less time, here and now.

    Measured on two copies, in turns, with the current number of threads, after one warm-up each; the medians are
    compared and a tie within 2 % keeps ``contiguous``. ``network`` and ``example`` are on the same device.

    Args:
        network: any module that maps ``example`` to one float tensor.
        example: a batch as in training, uint8 ``[B, C, H, W]``.
        repeats: measured rounds.

    Raises:
        ValueError: if ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats} but a measurement needs at least 1")
    copies: dict[MemoryFormat, nn.Module] = {}
    for memory_format in get_args(MemoryFormat):
        copies[memory_format] = copy.deepcopy(network)
        set_memory_format(copies[memory_format], memory_format)
    seconds: dict[MemoryFormat, list[float]] = {memory_format: [] for memory_format in copies}
    for repeat in range(-1, repeats):  # round −1 warms up
        for memory_format, module in copies.items():
            duration = _seconds(module, example)
            if repeat >= 0:
                seconds[memory_format].append(duration)
    return _faster(statistics.median(seconds["contiguous"]), statistics.median(seconds["channels_last"]))


def _faster(contiguous: float, channels_last: float) -> MemoryFormat:
    return "channels_last" if channels_last < (1 - TIE) * contiguous else "contiguous"


def _seconds(network: nn.Module, example: torch.Tensor) -> float:
    network.zero_grad(set_to_none=True)
    _synchronize(example.device)
    start = time.perf_counter()
    network(example).sum().backward()
    _synchronize(example.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
