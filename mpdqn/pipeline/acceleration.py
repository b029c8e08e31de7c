"""`Acceleration`: how a stage's layers are computed: in which precision, compiled or not; chosen by measurement.

float32    exact to float32's rounding, and what the transparency tests hold
tf32       products of 10-bit mantissas on NVIDIA's tensor cores, sums in float32
bf16       autocast: products, convolutions and what lies between them in bfloat16, norms and losses in float32
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from mpdqn.pipeline.compilation import Compiled

Precision = Literal["float32", "tf32", "bf16"]

WORTH = 1.05
"""How much faster a candidate has to be than the ones before it, which are more exact or start sooner."""


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """The ``precision`` of a network's arithmetic, and whether torch.compile (with ``backend``) makes its kernels."""

    precision: Precision = "float32"
    compiled: bool = False
    backend: str = "inductor"

    def apply(
        self,
        layers: nn.Module,
        device: torch.device,
        output_dtype: torch.dtype | None = None,
        name: str = "layers",
    ) -> nn.Module:
        """Return a module that computes ``layers`` with this precision and these kernels, and shares their parameters.

        Args:
            layers: [b, …] -> [b, …].
            device: where they are.
            output_dtype: what the output is turned into, at the end of the network; None keeps what comes out.
            name: an identifier for the compiler's logs.
        """
        module: nn.Module = layers
        if self.precision == "bf16":
            module = Autocast(layers, device.type, output_dtype)
        return Compiled(module, name, self.backend) if self.compiled else module

    @property
    def casts_weights(self) -> bool:
        """Whether every forward casts the weights, so that `cast_cache` can save all but the first cast of a step."""
        return self.precision == "bf16" and not self.compiled

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
        # A cast made without gradients would be found by a pass with gradients and would cut it off its weights.
        with torch.autocast(self.device_type, torch.bfloat16, cache_enabled=torch.is_grad_enabled()):
            output: Tensor = self.layers(x)
        return output if self.output_dtype is None else output.to(self.output_dtype)


@contextmanager
def cast_cache(enabled: bool) -> Iterator[None]:
    """Keep autocast's casts of trained weights until the end of the block, instead of to the end of each forward.

    Inside, no trained weight may change. Only the lifetime of the cache is extended: autocast stays off outside of
    `Autocast`, such as in the loss. Each backward still casts the gradient by itself, so that no bit changes.
    """
    if not enabled:
        yield
        return
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def candidates(precision: Precision | Literal["auto"], compile: Literal["auto", "on", "off"]) -> list[Acceleration]:
    """What is to be tried, the plainest first."""
    precisions: Sequence[Precision] = ("float32", "tf32", "bf16") if precision == "auto" else (precision,)
    kernels = {"auto": (False, True), "on": (True,), "off": (False,)}[compile]
    return [Acceleration(precision=p, compiled=c) for c in kernels for p in precisions]


def choose_acceleration(tried: Sequence[Acceleration], network: nn.Module, example: Tensor) -> Acceleration:
    """The fastest of ``tried`` at a forward and backward pass of ``network`` on ``example``, both on one device.

    A single candidate is not measured. One backward pass is what a compiled stage runs under every schedule: torch's
    split backward would run its one graph twice (see `StaticStage.whole_backward`). A later one wins only if
    it is `WORTH` times faster than what was best before it.
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
    if isinstance(module, Compiled) and not module.is_compiled:
        raise RuntimeError("torch.compile ran the layers uncompiled")
    return median(times[3:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
