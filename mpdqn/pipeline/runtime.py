"""`Pipeline`: runs an action table over torch's pipeline stages.

Each kind of pass (F/B online on obs, T target on next_obs, D online on next_obs) has stage objects of its own and a
process group of its own. At the start of a step a rank posts every receive that it will need, in the order of the
senders; then it runs its actions in the table's order, sends each result without waiting for it, and at the end sees to
it that all has left:

    rank 0   post B0 B1 | 0T0 → 0T1 → 0F0 → 0F1 → wait B0, 0B0  wait B1, 0B1
    rank 1   post T0 T1 F0 F1 | wait T0, 1T0  wait T1, 1T1  wait F0, 1F0  …

This is the only file that touches private names of torch; `_static_stage` is the place where its versions differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from mpdqn.mesh import Mesh, Message
from mpdqn.pipeline.stage import Stage
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.schedule.actions import BACKWARD, FORWARD, Action
from mpdqn.schedule.tables import Table, rank_order

Loss = Callable[[int, Tensor, Mapping[str, Tensor]], Tensor]
"""(micro-batch, q [b, A], value [b, A] of each no-gradient pass) -> scalar loss; called on the last stage's rank."""


class Pipeline:
    """The stages of one rank and the order in which it runs them."""

    def __init__(
        self, mesh: Mesh, stages: Sequence[Stage], table: Table, passes: Mapping[str, str], num_microbatches: int
    ) -> None:
        """A pipeline over ``stages`` of this rank.

        Args:
            mesh: who the other stages' ranks are.
            stages: this rank's stages.
            table: the actions of every stage of one step.
            passes: for each no-gradient pass, by letter, the network that it runs: ``online`` or ``target``.
            num_microbatches: m.
        """
        self._mesh, self._m = mesh, num_microbatches
        owners = mesh.plan.replica(mesh.replica)
        letters = "".join(passes)
        self.order = rank_order(table, owners, mesh.rank, letters)
        self._arrivals = _arrivals(table, owners, mesh.rank, letters)
        self._passes = passes
        self._runners: dict[tuple[str, int], _StaticStage] = {}
        for stage in stages:
            self._runners[FORWARD, stage.index] = _static_stage(mesh, stage, stage.online, num_microbatches, True)
            for letter, network in passes.items():
                module = stage.online if network == "online" else stage.target
                self._runners[letter, stage.index] = _static_stage(mesh, stage, module, num_microbatches, False)

    def run(self, obs: Tensor | None, next_obs: Tensor | None, loss: Loss, stopwatch: Stopwatch) -> None:
        """One step: every pass over every micro-batch; gradients are added to the parameters' ``.grad``.

        Args:
            obs: [b, C, H, W] uint8, this replica's part of the batch, on the rank of the first stage; None elsewhere.
            next_obs: likewise.
            loss: see `Loss`.
            stopwatch: gets a span for each action, from the moment its inputs are there.
        """
        arriving = self._post_receives()
        leaving: list[Message] = []
        frames = {FORWARD: _chunks(obs, self._m)} | {letter: _chunks(next_obs, self._m) for letter in self._passes}
        values: dict[tuple[str, int], Tensor] = {}
        losses: dict[int, Tensor] = {}
        for action in self.order:
            for message in arriving.pop(action, ()) or self._post(action):
                message.wait()
            begin = stopwatch.now()
            if action.kind == BACKWARD:
                leaving += self._backward(action, losses.pop(action.microbatch, None))
            else:
                output = self._forward(action, frames[action.kind], leaving)
                if action.stage == self._mesh.num_stages - 1:
                    values[action.kind, action.microbatch] = output
                    if action.kind == FORWARD:
                        i = action.microbatch
                        q = values.pop((FORWARD, i))
                        losses[i] = loss(i, q, {letter: values.pop((letter, i)) for letter in self._passes})
            stopwatch.mark(action.kind, begin, action.stage, action.microbatch)
        for message in leaving:
            message.wait()
        for runner in self._runners.values():
            runner.clear_runtime_states()

    def _post_receives(self) -> dict[Action, list[Message]]:
        """Every receive of this step, posted; by the action that waits for it.

        On a GPU none is: a receive that waits in a stream may hold up the very work that its sender waits for, so there
        each is posted when its action comes.
        """
        ahead = self._arrivals if self._mesh.device.type == "cpu" else ()
        return {action: self._post(action) for action in ahead}

    def _post(self, action: Action) -> list[Message]:
        """The receives that ``action`` waits for, posted; none if its inputs come from this rank."""
        stage, kind, i = action
        source = stage + 1 if kind == BACKWARD else stage - 1
        if not 0 <= source < self._mesh.num_stages or self._mesh.rank_of(source) == self._mesh.rank:
            return []
        runner = self._runner(action)
        ops = runner.get_bwd_recv_ops(i) if kind == BACKWARD else runner.get_fwd_recv_ops(i)
        return [self._mesh.receive(_flat(op.tensor), self._mesh.rank_of(source), kind) for op in ops]

    def _forward(self, action: Action, frames: Sequence[Tensor], leaving: list[Message]) -> Tensor:
        stage, kind, i = action
        runner = self._runner(action)
        with torch.set_grad_enabled(kind == FORWARD):
            inputs = (frames[i],) if stage == 0 else ()
            output: Tensor = runner.forward_one_chunk(i, inputs, {}, save_forward_output=False)
        if stage + 1 < self._mesh.num_stages:
            if self._mesh.rank_of(stage + 1) == self._mesh.rank:
                self._runners[kind, stage + 1].set_local_fwd_input(output, i)
            else:
                like = runner.example_output
                leaving += [
                    self._mesh.send(_flat(op.tensor, like), self._mesh.rank_of(stage + 1), kind)
                    for op in runner.get_fwd_send_ops(i)
                ]
        if kind != FORWARD:
            runner.fwd_cache.pop(i)  # nothing will run backward through it
        return output

    def _backward(self, action: Action, loss: Tensor | None) -> list[Message]:
        stage, _, i = action
        runner = self._runner(action)
        runner.backward_one_chunk(i, loss=loss)
        if stage == 0:
            runner.bwd_cache.pop(i)
            return []
        if self._mesh.rank_of(stage - 1) == self._mesh.rank:
            gradient = runner.get_local_bwd_output(i)  # type: ignore[no-untyped-call]
            self._runners[FORWARD, stage - 1].set_local_bwd_input(gradient, i)
            return []
        like = runner.example_input
        return [
            self._mesh.send(_flat(op.tensor, like), self._mesh.rank_of(stage - 1), BACKWARD)
            for op in runner.get_bwd_send_ops(i)
        ]

    def _runner(self, action: Action) -> _StaticStage:
        return self._runners[FORWARD if action.kind == BACKWARD else action.kind, action.stage]


class _StaticStage(PipelineStage):
    """torch's stage with the shapes of its micro-batches, told once instead of asked of the peer at each start."""

    example_input: Tensor
    example_output: Tensor


def _static_stage(mesh: Mesh, stage: Stage, module: nn.Module, num_microbatches: int, backward: bool) -> _StaticStage:
    runner = _StaticStage(
        module,
        stage.index,
        mesh.num_stages,
        mesh.device,
        input_args=stage.example_input,
        output_args=stage.example_output,
        group=mesh.pipeline_group,
    )
    runner.example_input, runner.example_output = stage.example_input, stage.example_output
    ranks = sorted(set(mesh.plan.replica(mesh.replica)))
    runner.stage_index_to_group_rank = {j: ranks.index(mesh.rank_of(j)) for j in range(mesh.num_stages)}
    runner.has_backward = backward
    if hasattr(runner, "_inference_mode"):  # torch 2.14
        from torch.distributed.pipelining._utils import InferenceMode

        runner._inference_mode = InferenceMode.STATIC
        runner._prepare_forward_infra(num_microbatches, None, None, backward)
    else:  # torch 2.11
        runner._prepare_forward_infra(num_microbatches, ())
    if backward:
        runner._prepare_backward_infra(num_microbatches)
    # torch 2.11 makes every buffer contiguous, whatever the example's strides are; 2.14 makes them like these.
    for received, like in ((runner.args_recv_info, stage.example_input), (runner.grad_recv_info, stage.example_output)):
        for info in itertools.chain.from_iterable(received.values()):
            if getattr(info, "buffer", None) is not None:
                info.buffer = torch.empty_like(like, device=mesh.device)
                info.buffer.requires_grad_(backward and received is runner.args_recv_info)
    return runner


def _arrivals(table: Table, owners: Sequence[int], rank: int, letters: str) -> list[Action]:
    """The actions of ``rank`` that another stage's result leads to, in the order in which the results are sent.

    Messages of one kind between two ranks are matched in the order in which they are posted. Where a rank holds several
    stages, it may take two results of a peer in another order than the peer sends them.
    """
    sent = [action for owner in dict.fromkeys(owners) for action in rank_order(table, owners, owner, letters)]
    led_to = [Action(a.stage - 1 if a.kind == BACKWARD else a.stage + 1, a.kind, a.microbatch) for a in sent]
    return [a for a in led_to if 0 <= a.stage < len(owners) and owners[a.stage] == rank]


def _chunks(frames: Tensor | None, num_microbatches: int) -> Sequence[Tensor]:
    return () if frames is None else frames.chunk(num_microbatches)


def _flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The memory of a dense tensor as one row, in the strides of ``like``: what a message carries.

    Messages carry memory, not strides. A gradient may come out of autograd in another memory format than the peer's
    buffer has; it is brought into the agreed one first.
    """
    if like is not None and tensor.stride() != like.stride():
        tensor = torch.empty_like(like, device=tensor.device).copy_(tensor)
    return tensor.detach().as_strided((tensor.numel(),), (1,))
