"""`StaticStage`: torch's pipeline stage with shapes that are known from the start, and the buffers that it needs.

This is the only file that touches private names of torch's pipelining; `static_stage` is where its versions differ.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from mpdqn.mesh import Mesh
from mpdqn.pipeline.compilation import Compiled
from mpdqn.pipeline.stage import Stage


class StaticStage(PipelineStage):
    """torch's stage with the shapes of its micro-batches, told once instead of asked of the peer at each start.

    ``forward`` and ``backward`` are torch's ``forward_one_chunk`` and ``backward_one_chunk`` for one tensor in and out;
    what torch checks, flattens and logs there for every micro-batch costs as much as a message.

    What a peer sends arrives in static buffers. Where the neighbouring stage is on this rank there are none: its tensor
    is taken as it is, and let go after its use.

    Attributes:
        example_input: meta tensor of one micro-batch.
        example_output: likewise, of what the stage returns.
        local_input: whether the stage before is on this rank.
        local_gradient: whether the stage behind is on this rank.
        whole_backward: whether the backward of the input is the whole one. A compiled stage is one node of autograd's
            graph: torch's split backward would run it once for the input and once more for the weights.
    """

    example_input: Tensor
    example_output: Tensor
    local_input: bool
    local_gradient: bool
    whole_backward: bool

    def forward(self, i: int, x: Tensor) -> Tensor:
        """The stage's output for micro-batch ``i``; where there is a graph, it is kept for the backward."""
        output: Tensor = self.submod(x)
        if torch.is_grad_enabled():
            self.fwd_cache[i] = (output,), [x]
        return output

    def backward(self, i: int, loss: Tensor | None) -> Tensor | None:
        """The whole backward of micro-batch ``i``: the gradient of its input, None on the first stage."""
        (output,), (x,) = self.fwd_cache.pop(i)
        if self.is_last:
            assert loss is not None
            torch.autograd.backward(loss)
            if not output._is_view():
                output.detach_()  # whoever still holds it shall not hold the graph
        else:
            torch.autograd.backward(output, self.gradient_in(i))
            self._release_gradient(i)
        gradient: Tensor | None = x.grad
        x.grad = None
        return gradient

    def backward_input(self, i: int, loss: Tensor | None) -> Tensor | None:
        """The backward of the input of micro-batch ``i``; `backward_weight` does what is left."""
        if self.whole_backward:
            return self.backward(i, loss)
        self.backward_one_chunk(i, loss=loss, full_backward=False)
        self._release_gradient(i)
        gradients = self.bwd_cache.pop(i)
        return gradients[0] if gradients else None

    def backward_weight(self, i: int) -> None:
        """The backward of the weights, after `backward_input`."""
        if not self.whole_backward:
            self.backward_weight_one_chunk(i)

    def input_of(self, i: int) -> Tensor:
        """Where micro-batch ``i`` arrives."""
        buffer: Tensor | None = self.args_recv_info[i][0].buffer
        assert buffer is not None
        return buffer

    def gradient_in(self, i: int) -> Tensor:
        """Where the gradient of the output of micro-batch ``i`` arrives."""
        buffer: Tensor | None = self.grad_recv_info[i][0].buffer
        assert buffer is not None
        return buffer

    def take_input(self, i: int, output: Tensor) -> None:
        """Have ``output`` of the stage before, on this rank, as the input of micro-batch ``i``."""
        self.args_recv_info[i][0].buffer = output.detach()

    def take_gradient(self, i: int, gradient: Tensor) -> None:
        """Have ``gradient`` of the stage behind, on this rank, as that of the output of micro-batch ``i``."""
        self.grad_recv_info[i][0].buffer = gradient

    def release_input(self, i: int) -> None:
        """Let go of the input of micro-batch ``i``, which no later forward needs; the graph keeps what it needs."""
        if self.local_input:
            self.args_recv_info[i][0].buffer = None

    def _release_gradient(self, i: int) -> None:
        if self.local_gradient:
            self.grad_recv_info[i][0].buffer = None

    def clear_runtime_states(self) -> None:
        """Forget the step: torch's method, for buffers that may be missing."""
        self.fwd_cache.clear()
        self.output_chunks.clear()
        for info in _infos(self.args_recv_info):
            if info.buffer is not None:
                info.buffer.grad = None  # else the next step's gradient would be added to it


def static_stage(mesh: Mesh, stage: Stage, module: nn.Module, num_microbatches: int, backward: bool) -> StaticStage:
    """Return ``module``, which computes one kind of pass of ``stage``, as torch's pipeline stage.

    Args:
        mesh: which stages this rank holds.
        stage: gives the shapes.
        module: [b, …] -> [b, …].
        num_microbatches: m.
        backward: whether its forwards keep a graph.
    """
    index = stage.index
    runner = StaticStage(
        module,
        index,
        mesh.num_stages,
        torch.device("meta"),  # torch would give every input and gradient a buffer, needed or not
        input_args=stage.example_input,
        output_args=stage.example_output,
        group=mesh.pipeline_group,
    )
    runner.example_input, runner.example_output = stage.example_input, stage.example_output
    ranks = sorted(set(mesh.plan.replica(mesh.replica)))
    runner.stage_index_to_group_rank = {j: ranks.index(mesh.rank_of(j)) for j in range(mesh.num_stages)}
    runner.has_backward = backward
    runner.whole_backward = isinstance(module, Compiled) and index > 0
    runner.local_input = index > 0 and mesh.rank_of(index - 1) == mesh.rank
    runner.local_gradient = index < mesh.num_stages - 1 and mesh.rank_of(index + 1) == mesh.rank
    if hasattr(runner, "_inference_mode"):  # torch 2.14
        from torch.distributed.pipelining._utils import InferenceMode

        runner._inference_mode = InferenceMode.STATIC
        runner._prepare_forward_infra(num_microbatches, None, None, backward)
    else:  # torch 2.11
        runner._prepare_forward_infra(num_microbatches, ())
    if backward:
        runner._prepare_backward_infra(num_microbatches)
    runner.device = mesh.device
    for received, like, local in (
        (runner.args_recv_info, stage.example_input, runner.local_input),
        (runner.grad_recv_info, stage.example_output, runner.local_gradient),
    ):
        for info in _infos(received):
            if info.buffer is not None:
                # In the strides of the example, which torch 2.11 would not keep.
                info.buffer = None if local else torch.empty_like(like, device=mesh.device)
                if not local and received is runner.args_recv_info:
                    info.buffer.requires_grad_(backward)
    return runner


def _infos(received: dict[int, tuple[Any, ...]]) -> list[Any]:
    """What torch keeps of each tensor that arrives, over all micro-batches; frames of the first stage do not."""
    return [info for info in itertools.chain.from_iterable(received.values()) if hasattr(info, "buffer")]
