"""`Acceleration`: how a stage's layers are computed: in which precision, compiled or not; chosen by measurement.

float32    exact to float32's rounding, and what the transparency tests hold
tf32       products of 10-bit mantissas on NVIDIA's tensor cores, sums in float32
bf16       autocast: products, convolutions and what lies between them in bfloat16, norms and losses in float32
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "tf32", "bf16"]

WORTH = 1.05
"""How much faster a candidate has to be than the ones before it, which are more exact or start sooner."""


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """The ``precision`` of a network's arithmetic, and whether torch.compile makes its kernels."""

    precision: Precision = "float32"
    compiled: bool = False

    def apply(self, layers: nn.Module, device: torch.device, output_dtype: torch.dtype | None = None) -> nn.Module:
        """``layers`` computed so, sharing their parameters.

        Args:
            layers: [b, …] -> [b, …].
            device: where they are.
            output_dtype: what the output is turned into, at the end of the network; None keeps what comes out.
        """
        module: nn.Module = layers
        if self.precision == "bf16":
            module = Autocast(layers, device.type, output_dtype)
        if self.compiled:
            compiled = torch.compile(module, dynamic=False)
            assert isinstance(compiled, nn.Module)
            return compiled
        return module

    def set_products(self) -> None:
        """Let CUDA's float32 products and convolutions of this process use TF32, or not."""
        allowed = self.precision != "float32"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed

    def __str__(self) -> str:
        return f"{self.precision}{', compiled' if self.compiled else ''}"


class Autocast(nn.Module):
    """Layers in bfloat16 autocast. A stage hands on what its last layer gives, so that a cut changes no number."""

    def __init__(self, layers: nn.Module, device_type: str, output_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layers, self.device_type, self.output_dtype = layers, device_type, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[b, …] to [b, …]."""
        with torch.autocast(self.device_type, torch.bfloat16):
            output: Tensor = self.layers(x)
        return output if self.output_dtype is None else output.to(self.output_dtype)


def candidates(precision: Precision | Literal["auto"], compile: Literal["auto", "on", "off"]) -> list[Acceleration]:
    """What is to be tried, the plainest first."""
    precisions: Sequence[Precision] = ("float32", "tf32", "bf16") if precision == "auto" else (precision,)
    kernels = {"auto": (False, True), "on": (True,), "off": (False,)}[compile]
    return [Acceleration(precision=p, compiled=c) for c in kernels for p in precisions]


def choose_acceleration(tried: Sequence[Acceleration], network: nn.Module, example: Tensor) -> Acceleration:
    """The fastest of ``tried`` at a forward and backward pass of ``network`` on ``example``, both on one device.

    One of them is not measured. A later one wins only if it is `WORTH` times faster than what was best before it.
    """
    if len(tried) == 1:
        return tried[0]
    best, least = tried[0], float("inf")
    for acceleration in tried:
        try:
            seconds = _seconds(acceleration, network, example)
        except Exception as error:  # no compiler, too little memory, a layer that it cannot take
            if acceleration == tried[0]:
                raise
            warnings.warn(f"{acceleration} failed and is not used: {' '.join(str(error).split())[:200]}", stacklevel=2)
            continue
        if seconds * WORTH < least or least == float("inf"):
            best, least = acceleration, seconds
    return best


def _seconds(acceleration: Acceleration, network: nn.Module, example: Tensor, repeats: int = 15) -> float:
    if example.device.type == "cuda":
        acceleration.set_products()
    module = acceleration.apply(network, example.device, torch.float32)
    times = []
    for _ in range(3 + repeats):
        _synchronize(example.device)
        begin = time.perf_counter()
        module(example).sum().backward()
        _synchronize(example.device)
        times.append(time.perf_counter() - begin)
    network.zero_grad(set_to_none=True)
    return median(times[3:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
