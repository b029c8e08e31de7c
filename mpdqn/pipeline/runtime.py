"""`Pipeline`: runs action tables over torch's pipeline stages.

Each kind of pass (F/B online on obs, T target on next_obs, …) has stage objects of its own and a process group of its
own. At the start of a step a rank posts every receive that it will need, in the order of the
senders (on a GPU each when its action comes); then it runs its actions in the table's order, sends each result without
waiting for it, and at the end sees to it that all has left:

    rank 0   post B0 B1 | 0T0 → 0T1 → 0F0 → 0F1 → wait B0, 0B0  wait B1, 0B1
    rank 1   post T0 T1 F0 F1 | wait T0, 1T0  wait T1, 1T1  wait F0, 1F0  …
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mpdqn.mesh import Mesh
from mpdqn.message import Message
from mpdqn.pipeline.acceleration import cast_cache
from mpdqn.pipeline.compilation import Compiled
from mpdqn.pipeline.recompute import Checkpointed, CloneViewOutput
from mpdqn.pipeline.stage import Stage
from mpdqn.pipeline.static_stage import StaticStage, static_stage
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.schedule.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    GRADIENTS_OF_INPUT,
    GRADIENTS_OF_WEIGHTS,
    RECOMPUTE,
    TRAINING,
    Action,
)
from mpdqn.schedule.tables import ActionTable

Loss = Callable[[int, Tensor, Mapping[str, Tensor]], Tensor]
"""(micro-batch, output of F [b, …], that of each no-gradient pass) -> scalar loss; on the last stage's rank."""

Values = dict[str, dict[int, Tensor]]
"""What no-gradient passes gave: by letter and micro-batch, [b, …] each; empty but on the last stage's rank."""


@dataclass(frozen=True)
class Program:
    """What one rank does in a step of ``table``.

    ``arrivals`` are its actions that wait for a message, by sender and kind of message, in the order of the sending.
    ``rerun`` are the forwards that keep no graph; ``completes`` names, for the last action that adds to a stage's
    gradients, the stage.
    """

    table: ActionTable
    order: tuple[Action, ...]
    arrivals: Mapping[tuple[int, str], tuple[Action, ...]]
    rerun: frozenset[Action]
    completes: Mapping[Action, int]

    @cached_property
    def route_of(self) -> Mapping[Action, tuple[int, str]]:
        """The sender and the kind of the message that each action of ``arrivals`` waits for."""
        return {action: route for route, actions in self.arrivals.items() for action in actions}

    @cached_property
    def results_go_to(self) -> Mapping[Action, Action | None]:
        """`ActionTable.result_goes_to` of each action of this rank."""
        return {action: self.table.result_goes_to(action) for action in self.order}


class Pipeline:
    """The stages of one rank, and what it takes to run a table over them."""

    def __init__(
        self,
        mesh: Mesh,
        stages: Sequence[Stage],
        table: ActionTable,
        passes: Mapping[str, str],
        recompute: Sequence[str] = (),
    ) -> None:
        """A pipeline over ``stages`` of this rank.

        Args:
            mesh: who the other stages' ranks are.
            stages: this rank's stages.
            table: a step with all kinds of actions that will be run.
            passes: for each no-gradient pass, by letter, the network that it runs: ``online`` or ``target``.
            recompute: for every stage one of `mpdqn.plan.RECOMPUTATION`.
        """
        self._mesh, self._m = mesh, table.num_microbatches
        self._owners = mesh.plan.replica(mesh.replica)
        self._passes = passes
        self._runners: dict[tuple[str, int], StaticStage] = {}
        for stage in stages:
            online: nn.Module = stage.online
            if recompute and recompute[stage.index] == "boundaries":
                online = Checkpointed(stage.online)
            online = stage.computing(online, f"stage{stage.index}_F")
            if any(a.stage == stage.index and a.kind == BACKWARD_INPUT for a in table.actions):
                online = online if isinstance(online, Compiled) else CloneViewOutput(online)
            self._runners[FORWARD, stage.index] = static_stage(mesh, stage, online, self._m, True)
            for letter, network in passes.items():
                layers = stage.online if network == "online" else stage.target
                module = stage.computing(layers, f"stage{stage.index}_{letter}")
                self._runners[letter, stage.index] = static_stage(mesh, stage, module, self._m, False)
        self._casts_weights = any(stage.acceleration.casts_weights for stage in stages)

    @property
    def compiled_modules(self) -> int:
        """How many of this rank's modules, one for each stage and kind of pass, run as dynamo compiled them.

        They are compiled when they first run: 0 before the first step, and 0 without compilation.
        """
        modules = [runner.submod for runner in self._runners.values()]
        return sum(isinstance(module, Compiled) and module.is_compiled for module in modules)

    def program(self, table: ActionTable) -> Program:
        """This rank's part in ``table``, over the stages of this pipeline."""
        rank, owners = self._mesh.rank, self._owners
        order = table.rank_order(owners, rank)
        arrivals: dict[tuple[int, str], list[Action]] = {}
        for owner in dict.fromkeys(owners):
            for action in table.rank_order(owners, owner) if owner != rank else ():
                to = table.result_goes_to(action)
                if to is not None and owners[to.stage] == rank:
                    arrivals.setdefault((owner, _message_kind(action.kind)), []).append(to)
        last = {a.stage: a for a in order if a.kind in GRADIENTS_OF_WEIGHTS}
        return Program(
            table=table,
            order=order,
            arrivals={route: tuple(actions) for route, actions in arrivals.items()},
            rerun=frozenset(a for a in order if a.kind == FORWARD and a._replace(kind=RECOMPUTE) in table.actions),
            completes={action: stage for stage, action in last.items()},
        )

    def run(
        self,
        program: Program,
        frames: Mapping[str, Tensor],
        loss: Loss,
        stopwatch: Stopwatch,
        *,
        known: Values | None = None,
        after: Callable[[Action], None] | None = None,
    ) -> Values:
        """One step: every action of ``program``; gradients are added to the parameters' ``.grad``.

        Args:
            program: what to run, over the stages of this pipeline.
            frames: [b, C, H, W] uint8, this replica's part of a batch, for each kind of pass, obs or next_obs; on
                the rank of the first stage, empty elsewhere.
            loss: see `Loss`.
            stopwatch: gets a span for each action, from the moment its inputs are there.
            known: values of passes that ran in an earlier step, for the loss of this one.
            after: is told each action as it ends.

        Returns:
            the values of the passes over the next batch.

        Raises:
            PeerLost: if a message does not come in time.
            ValueError: if a stage returns another shape than it was built for.
        """
        with cast_cache(self._casts_weights):
            return self._run(program, frames, loss, stopwatch, known or {}, after)

    def _run(
        self,
        program: Program,
        frames: Mapping[str, Tensor],
        loss: Loss,
        stopwatch: Stopwatch,
        known: Values,
        after: Callable[[Action], None] | None,
    ) -> Values:
        chunks = {kind: batch.chunk(self._m) for kind, batch in frames.items()}
        values: Values = {letter: dict(by_microbatch) for letter, by_microbatch in known.items()}
        ahead: Values = {letter: {} for letter in program.table.ahead}
        losses: dict[int, Tensor] = {}
        leaving: list[Message] = []
        pending = {route: iter(actions) for route, actions in program.arrivals.items()}
        arriving: dict[Action, Message] = {}
        # On a GPU a receive that waits in a stream may hold up the very work that its sender waits for: there each is
        # posted when its action comes. On the CPU all are, now.
        if self._mesh.device.type == "cpu":
            for route, actions in pending.items():
                arriving |= {action: self._post(action, route) for action in actions}
        last_stage = self._mesh.num_stages - 1
        for action in program.order:
            stage, kind, i = action
            self._mesh.world.activity.set(action)
            try:
                if action in program.route_of:
                    while action not in arriving:
                        due = next(pending[program.route_of[action]])
                        arriving[due] = self._post(due, program.route_of[action])
                    arriving.pop(action).wait()
                begin = stopwatch.now()
                if kind in GRADIENTS_OF_INPUT:
                    self._backward(action, losses.pop(i, None), leaving)
                elif kind == BACKWARD_WEIGHT:
                    self._runners[FORWARD, stage].backward_weight(i)
                elif stage == last_stage and action in program.rerun:
                    pass  # nobody waits for its output: the input has come, and R does the rest
                else:
                    q = self._forward(action, chunks.get(FORWARD if kind == RECOMPUTE else kind, ()), leaving, program)
                    if stage < last_stage or action in program.rerun:
                        pass
                    elif kind in ahead:
                        ahead[kind][i] = q
                    elif kind not in TRAINING:
                        values.setdefault(kind, {})[i] = q
                    else:
                        losses[i] = loss(i, q, {letter: values[letter].pop(i) for letter in self._passes})
                stopwatch.mark(kind, begin, stage, i)
                if after is not None:
                    after(action)
            except Exception as error:
                cause = _first_cause(error)
                cause.add_note(f"in {action} (stage, kind, micro-batch) of {program.table.schedule}")
                raise cause from None
        for message in leaving:
            message.wait()
        for runner in self._runners.values():
            runner.clear_runtime_states()
        return ahead

    def _post(self, action: Action, route: tuple[int, str]) -> Message:
        """The receive that ``action`` waits for, posted."""
        runner, i = self._runner(action), action.microbatch
        return self._mesh.receive(_flat(runner.gradient_in(i) if route[1] == BACKWARD else runner.input_of(i)), *route)

    def _forward(self, action: Action, frames: Sequence[Tensor], leaving: list[Message], program: Program) -> Tensor:
        stage, kind, i = action
        runner = self._runner(action)
        graph = kind in (FORWARD, RECOMPUTE) and action not in program.rerun
        with torch.set_grad_enabled(graph):
            output = runner.forward(i, frames[i] if stage == 0 else runner.input_of(i).requires_grad_(graph))
        if action not in program.rerun:  # whose R needs the input once more
            runner.release_input(i)
        like = runner.example_output
        if output.shape != like.shape or output.dtype != like.dtype:
            raise ValueError(
                f"stage {stage} promised {_shape(like)} for each micro-batch but returned {_shape(output)} for "
                f"{action}; its layers must return one shape and dtype for one batch size"
            )
        to = program.results_go_to[action]
        if to is not None:
            if self._owners[to.stage] == self._mesh.rank:
                self._runner(to).take_input(i, output)
            else:
                leaving.append(self._mesh.send(_flat(output, like), self._owners[to.stage], kind))
        return output

    def _backward(self, action: Action, loss: Tensor | None, leaving: list[Message]) -> None:
        stage, kind, i = action
        runner = self._runner(action)
        gradient = runner.backward(i, loss) if kind == BACKWARD else runner.backward_input(i, loss)
        if stage == 0:
            return
        assert gradient is not None
        before = self._owners[stage - 1]
        if before == self._mesh.rank:
            self._runners[FORWARD, stage - 1].take_gradient(i, gradient)
        else:
            leaving.append(self._mesh.send(_flat(gradient, runner.example_input), before, BACKWARD))

    def _runner(self, action: Action) -> StaticStage:
        return self._runners[FORWARD if action.kind in TRAINING else action.kind, action.stage]


def _first_cause(error: Exception) -> BaseException:
    """What the network itself raised, out of the frame of shapes that torch puts around a backward in two parts."""
    framed = isinstance(error, RuntimeError) and "ailed to run" in str(error) and error.__cause__ is not None
    return error.__cause__ if framed and error.__cause__ is not None else error


def _message_kind(kind: str) -> str:
    """Which process group carries the result of an action of ``kind``."""
    return BACKWARD if kind in GRADIENTS_OF_INPUT else kind


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The memory of a dense tensor as one row, in the strides of ``like``: what a message carries.

    Messages carry memory, not strides. A gradient may come out of autograd in another memory format than the peer's
    buffer has; it is brought into the agreed one first.
    """
    if like is not None and tensor.stride() != like.stride():
        tensor = torch.empty_like(like, device=tensor.device).copy_(tensor)
    return tensor.detach().as_strided((tensor.numel(),), (1,))
