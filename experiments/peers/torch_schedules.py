"""torch.distributed.pipelining's schedules, and messages without any, over a chain whose stages are single layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

Step = Callable[[], None]
Loss = Callable[[Tensor], Tensor]

SINGLE = {"ScheduleGPipe": ScheduleGPipe, "Schedule1F1B": Schedule1F1B}
"""Schedules that take one stage."""

MULTI = {
    "ScheduleInterleaved1F1B": ScheduleInterleaved1F1B,
    "ScheduleLoopedBFS": ScheduleLoopedBFS,
    "ScheduleInterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ScheduleZBVZeroBubble": ScheduleZBVZeroBubble,
}
"""Schedules that take a list of stages."""


def torch_schedule(
    name: str,
    layers: Sequence[nn.Module],
    lanes: Sequence[int],
    batch: Tensor,
    m: int,
    loss: Loss,
    group: dist.ProcessGroup,
) -> Step:
    """One step of torch's schedule ``name`` per call; layer j is stage j, on rank ``lanes[j]``."""
    rank, p = dist.get_rank(), len(layers)
    stages = [
        PipelineStage(layer, j, p, batch.device, group=group) for j, layer in enumerate(layers) if lanes[j] == rank
    ]

    def loss_of(q: Tensor, labels: Tensor) -> Tensor:
        return loss(q)

    # The loss is a sum over rows: to divide gradients by m would make it another one.
    schedule = (
        SINGLE[name](stages[0], m, loss_fn=loss_of, scale_grads=False)
        if name in SINGLE
        else MULTI[name](list(stages), m, loss_fn=loss_of, scale_grads=False)
    )
    inputs = (batch,) if lanes[0] == rank else ()
    target = torch.zeros(len(batch)) if lanes[-1] == rank else None

    def step() -> None:
        schedule.step(*inputs, target=target, return_outputs=False)

    return step


def raw_messages(layers: Sequence[nn.Module], batch: Tensor, m: int, loss: Loss, group: dist.ProcessGroup) -> Step:
    """isend, irecv and autograd over two ranks, in an order written by hand: about the least that Python can do.

    Rank 0 sends every activation and then takes the gradients as they come; rank 1 answers each activation at once.
    """
    rank, chunks = dist.get_rank(), batch.chunk(m)
    layer, peer = layers[rank], 1 - rank
    with torch.no_grad():
        arrivals = [torch.empty_like(layers[0](chunk)) for chunk in chunks]

    def first() -> None:
        coming = [dist.irecv(buffer, peer, group) for buffer in arrivals]
        outputs, going = [], []
        for chunk in chunks:
            output = layer(chunk)
            going.append(dist.isend(output.detach(), peer, group))
            outputs.append(output)
        for output, gradient, message in zip(outputs, arrivals, coming, strict=True):
            _wait(message)
            torch.autograd.backward(output, gradient)
        for message in going:
            _wait(message)

    def last() -> None:
        coming = [dist.irecv(buffer, peer, group) for buffer in arrivals]
        going = []
        for buffer, message in zip(arrivals, coming, strict=True):
            _wait(message)
            x = buffer.detach().requires_grad_()
            torch.autograd.backward(loss(layer(x)))
            assert x.grad is not None
            going.append((dist.isend(x.grad, peer, group), x))  # a gradient is kept until it has left
        for message, _ in going:
            _wait(message)

    return first if rank == 0 else last


def _wait(message: dist.Work | None) -> None:
    assert message is not None
    message.wait()
