"""Defects of schedules, recomputation, lookahead, soft target updates and accumulation.

Each function returns a patch of one name of the real code, to be entered while a layout runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mpdqn.dqn import agents
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.learner import Learner
from mpdqn.pipeline.runtime import Pipeline, Values
from mpdqn.pipeline.stage import Stage
from mpdqn.pipeline.static_stage import StaticStage
from mpdqn.schedule import Action
from mpdqn.schedule.actions import RECOMPUTE


def refresh_that_keeps_the_passes_ahead_of_it() -> Any:
    """The update before the target changes fills its gaps, too: with values of the old target."""
    real = Learner.learn

    def learn(self: Learner, batch: Any, upcoming: Any = None) -> Any:
        config = self.config
        self.config = replace(config, target_period=10**9)
        step = real(self, batch, upcoming)
        self.config = config
        if self.update % config.target_period == 0:
            for stage in self.stages:
                stage.refresh_target(config.target_tau)
        return step

    return patch.object(Learner, "learn", learn)


def values_of_before_the_refresh() -> Any:
    """The late passes after a refresh are left out: what was prepared for the update before is used once more."""
    real = Learner.learn

    def learn(self: Learner, batch: Any, upcoming: Any = None) -> Any:
        prepared = self._prepared
        step = real(self, batch, upcoming)
        if self._prepared is None:
            self._prepared = prepared
        return step

    return patch.object(Learner, "learn", learn)


def gaps_filled_with_this_batch() -> Any:
    real = Learner._frames
    return patch.object(
        Learner, "_frames", lambda self, program, batch, upcoming, part: real(self, program, batch, batch, part)
    )


def swapped_values_of_the_next_batch() -> Any:
    """The values that two micro-batches of a pass ahead gave change places."""
    real = Pipeline.run

    def run(self: Pipeline, *args: Any, **options: Any) -> Values:
        ahead = real(self, *args, **options)
        return {k: {i: v[{0: 1, 1: 0}.get(i, i)] for i in v} for k, v in ahead.items()}

    return patch.object(Pipeline, "run", run)


def values_of_the_step_before() -> Any:
    """Double DQN chooses with what the online network said in the last step."""
    real = Pipeline._forward
    kept: dict[int, Tensor] = {}

    def forward(self: Pipeline, action: Action, *rest: Any) -> Tensor:
        output = real(self, action, *rest)
        if action.kind == "D" and action.stage == self._mesh.num_stages - 1:
            before = kept.get(action.microbatch, output)
            kept[action.microbatch] = output
            return before
        return output

    return patch.object(Pipeline, "_forward", forward)


def lost_weight_gradients_of_a_microbatch() -> Any:
    real = StaticStage.backward_weight

    def backward_weight(self: StaticStage, i: int) -> None:
        if i != 1:
            real(self, i)

    return patch.object(StaticStage, "backward_weight", backward_weight)


def weight_gradients_twice() -> Any:
    real = StaticStage.backward_weight

    def backward_weight(self: StaticStage, i: int) -> None:
        parameters = list(self.submod.parameters())
        before = [0 if p.grad is None else p.grad.clone() for p in parameters]
        real(self, i)
        for p, old in zip(parameters, before, strict=True):
            if i == 2 and p.grad is not None:
                p.grad += p.grad - old

    return patch.object(StaticStage, "backward_weight", backward_weight)


def split_that_loses_the_gradient_of_the_input() -> Any:
    real = StaticStage.backward_input

    def backward_input(self: StaticStage, i: int, loss: Tensor | None) -> Tensor | None:
        gradient = real(self, i, loss)
        return gradient if gradient is None else torch.zeros_like(gradient)

    return patch.object(StaticStage, "backward_input", backward_input)


def recomputed_from_the_frames_of_another_microbatch() -> Any:
    real = Pipeline._forward

    def forward(self: Pipeline, action: Action, frames: Any, *rest: Any) -> Tensor:
        if action.kind == RECOMPUTE:
            frames = [*frames[1:], *frames[:1]]
        return real(self, action, frames, *rest)

    return patch.object(Pipeline, "_forward", forward)


def recomputed_from_what_another_microbatch_received() -> Any:
    real = Pipeline._forward

    def forward(self: Pipeline, action: Action, *rest: Any) -> Tensor:
        if action.kind != RECOMPUTE:
            return real(self, action, *rest)
        first = self._runner(action).args_recv_info[0]
        with patch.dict(self._runner(action).args_recv_info, {action.microbatch: first}):
            return real(self, action, *rest)

    return patch.object(Pipeline, "_forward", forward)


def recomputed_with_other_weights() -> Any:
    real = Pipeline._forward

    def forward(self: Pipeline, action: Action, *rest: Any) -> Tensor:
        if action.kind != RECOMPUTE:
            return real(self, action, *rest)
        parameters = list(self._runner(action).submod.parameters())
        kept = [p.data for p in parameters]
        for p in parameters:
            p.data = 0.99 * p.data
        output = real(self, action, *rest)
        for p, data in zip(parameters, kept, strict=True):
            p.data = data
        return output

    return patch.object(Pipeline, "_forward", forward)


def soft_update_that_copies() -> Any:
    real = Stage.refresh_target
    return patch.object(Stage, "refresh_target", lambda self, tau: real(self))


def soft_update_the_other_way_round() -> Any:
    real = Stage.refresh_target
    return patch.object(Stage, "refresh_target", lambda self, tau: real(self, 1 - tau))


def labels_of_the_first_part_for_all() -> Any:
    real = agents.Labels.rows

    def first_part(self: agents.Labels, start: int, stop: int) -> agents.Labels:
        first = start % (len(self.action) // 2)
        return real(self, first, first + stop - start)

    return patch.object(agents.Labels, "rows", first_part)


def frames_of_the_first_part_for_all() -> Any:
    real = Learner._frames
    return patch.object(
        Learner, "_frames", lambda self, program, batch, upcoming, part: real(self, program, batch, upcoming, 0)
    )


def gradients_of_the_last_part_only() -> Any:
    real = Pipeline.run

    def run(self: Pipeline, *args: Any, **options: Any) -> Values:
        for runner in self._runners.values():
            for p in runner.submod.parameters():
                p.grad = None
        return real(self, *args, **options)

    return patch.object(Pipeline, "run", run)


def reduced_in_every_part() -> Any:
    """Each part ends with a sum over the replicas: what the first ones gave is counted d times."""
    real = Pipeline.run

    def run(self: Pipeline, *args: Any, **options: Any) -> Values:
        values = real(self, *args, **options)
        if options.get("after") is None:
            exchange = SynchronousExchange(self._mesh)
            for (kind, stage), runner in self._runners.items():
                if kind == "F":
                    exchange.start(stage, list(runner.submod.parameters()))
            exchange.finish()
        return values

    return patch.object(Pipeline, "run", run)
