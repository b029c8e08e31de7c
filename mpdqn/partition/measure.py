"""The measurement behind `profile`: the network as a chain of layers, each between two clock reads.

    forward    obs ─▶ layer 0 ─▶ e₁ ─▶ layer 1 ─▶ e₂ ─▶ layer 2 ─▶ e₃        e: gradient edges, where the graph is cut
    backward          layer 0 ◀─ e₁ ◀─ layer 1 ◀─ e₂ ◀─ layer 2 ◀─ e₃ ◀─ ones

One graph runs through all layers and is walked back one layer at a time, as in a training step: a layer finds the
caches as its neighbours left them, and repeating a layer by itself, with its weights warm, would flatter it. Two kinds
of rounds alternate. A *full* round asks each layer for the gradients of its input and its parameters, an *input* round
for the former only. backward-input is the input round's time, capped by the full one's, and backward-weight is the rest
of the full one. So the two always add up to the full backward pass, which measuring each alone would not give: the two
gradients of a convolution share work. A layer without parameters has its whole backward in backward-input. Where
micro-batches accumulate, adding a gradient to the sum of the earlier ones counts to backward-weight; it grows with the
parameters and not with the batch, and so moves the best cut.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from mpdqn.plan import LayerCost

Clock = Callable[[], float]


def layer_costs(
    model: nn.Sequential, example: Tensor, *, repeats: int, warmup: int, accumulate: bool
) -> tuple[LayerCost, ...]:
    """The costs of each layer of ``model`` on ``example``: medians over ``repeats`` rounds, after ``warmup`` rounds.

    Raises:
        TypeError: if a layer returns anything but one tensor.
        ValueError: if a layer hides the gradient of its input.
    """
    layers = named_layers(model)
    activations, boundaries = layer_bytes(model, example)
    clock = _clock(example.device)
    sums = {p: torch.zeros_like(p) for p in model.parameters() if p.requires_grad} if accumulate else {}
    rounds = [
        (_round(layers, example, clock, sums, weights=True), _round(layers, example, clock, sums, weights=False))
        for _ in range(warmup + repeats)
    ][warmup:]
    costs = []
    for k, (name, layer) in enumerate(layers.items()):
        forward = median(times[0][k] for pair in rounds for times in pair)
        full = median(pair[0][1][k] for pair in rounds)
        backward_input = min(full, median(pair[1][1][k] for pair in rounds)) if _trained(layer) else full
        costs.append(
            LayerCost(
                name=name,
                forward_ms=forward,
                backward_input_ms=backward_input,
                backward_weight_ms=full - backward_input,
                parameter_bytes=sum(p.numel() * p.element_size() for p in layer.parameters()),
                activation_bytes=activations[k],
                boundary_bytes=boundaries[k],
            )
        )
    return tuple(costs)


@contextlib.contextmanager
def as_before(model: nn.Module, device: torch.device, threads: int | None) -> Iterator[None]:
    """Run with gradients enabled on ``threads`` threads; restore threads, buffers and random state after."""
    threads_before = torch.get_num_threads()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]  # BatchNorm counts every forward
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            torch.set_num_threads(threads or threads_before)
            yield
        finally:
            torch.set_num_threads(threads_before)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def device_name(device: torch.device) -> str:
    """What a profile calls ``device``: the model of a GPU, since its index says nothing about times; else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_format(model: nn.Module) -> str:
    """The layout of the convolution weights: ``channels_last``, ``contiguous``, or ``mixed``.

    Weights that both names fit, those of 1 × 1 kernels or with one input channel, have no say.
    """
    formats = set()
    for parameter in model.parameters():
        if parameter.dim() == 4:
            last, first = parameter.is_contiguous(memory_format=torch.channels_last), parameter.is_contiguous()
            if last != first:
                formats.add("channels_last" if last else "contiguous")
    return "mixed" if len(formats) > 1 else next(iter(formats), "contiguous")


def named_layers(model: nn.Sequential) -> dict[str, nn.Module]:
    """The layers of the chain ``model`` by name, in their order; one that stands in two places, twice."""
    # Not named_children: it names such a layer only once.
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name and "." not in name]
    return dict(zip(names, model, strict=True))


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _clock(device: torch.device) -> Clock:
    """The wall clock in ms, read when ``device`` has finished what it was given."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    return clock


def _round(
    layers: dict[str, nn.Module],
    example: Tensor,
    clock: Clock,
    sums: dict[nn.Parameter, Tensor],
    *,
    weights: bool,
) -> tuple[list[float], list[float]]:
    """The forward and backward ms of each layer in one training step; without ``weights``, of input gradients only.

    The gradient of each parameter that is in ``sums`` is added to its sum there.
    """
    forward, backward = [], [0.0] * len(layers)
    edges: list[GradientEdge | None] = [None]
    x = example
    for layer in layers.values():
        start = clock()
        x = layer(x)
        forward.append(clock() - start)
        edges.append(get_gradient_edge(x) if x.requires_grad else None)
    gradient = torch.ones_like(x)
    del x  # the graph alone decides what lives on, as in a training step

    for k, (name, layer) in reversed(list(enumerate(layers.items()))):
        output, into = edges.pop(), edges[k]
        trained = _trained(layer) if weights else []
        inputs = [*([into] if into else []), *map(get_gradient_edge, trained)]
        if output is None or not inputs:
            break  # nothing below takes part: frames carry no gradient, nor does what is computed from them alone
        start = clock()
        gradients = torch.autograd.grad([output], inputs, grad_outputs=[gradient], allow_unused=True)
        for parameter, weight_gradient in zip(reversed(trained), reversed(gradients), strict=False):
            if parameter in sums and weight_gradient is not None:
                sums[parameter] += weight_gradient
        backward[k] = clock() - start
        if into is None:
            break
        if gradients[0] is None:
            raise ValueError(
                f"no gradient passes from layer {k} ({name!r}) to its input; a layer that works in place on a view, as "
                "ReLU(inplace=True) after Flatten, hides it: use inplace=False"
            )
        gradient = gradients[0]
    return forward, backward


def layer_bytes(model: nn.Sequential, example: Tensor) -> tuple[list[int], list[int]]:
    """What autograd keeps for each layer, and the size of each layer's output, in bytes.

    A storage that several layers keep, as the output of a ReLU that the next convolution needs too, counts for the
    first of them. Parameters and buffers are kept anyway and do not count.
    """
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, lest a freed address be given out again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept.setdefault(storage.data_ptr(), storage)
        return tensor

    activations, boundaries = [], []
    x = example
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        for k, (name, layer) in enumerate(named_layers(model).items()):
            before = len(kept)
            x = layer(x)
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"layer {k} ({name!r}) returns {type(x).__name__}, but a layer of a flat network returns one Tensor"
                )
            activations.append(sum(storage.nbytes() for storage in list(kept.values())[before:]))
            boundaries.append(x.numel() * x.element_size())
    return activations, boundaries
