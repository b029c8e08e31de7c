"""Defects of an update in micro-batches, stages and replicas: sums, messages, clipping, refreshes, the batch.

Each function returns a patch of one name of the real code, to be entered while a layout runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import tests.transparency as transparency
from mpdqn.dqn import agents, losses
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh
from mpdqn.pipeline import runtime
from mpdqn.pipeline.labels import LabelExchange
from mpdqn.pipeline.runtime import Pipeline, Program
from mpdqn.pipeline.stage import Stage
from mpdqn.replay import VirtualShards
from mpdqn.schedule import Action, ActionTable
from mpdqn.schedule.actions import BACKWARD_INPUT, GRADIENTS_OF_WEIGHTS


def missing_1_over_m() -> Any:
    def mean_of_the_rows(terms: Tensor, weight: Tensor, global_batch_size: int) -> Tensor:
        return (terms * weight).mean()

    return patch.object(agents, "global_mean", mean_of_the_rows)


def missing_1_over_d() -> Any:
    real = losses.global_mean
    return patch.object(agents, "global_mean", lambda terms, weight, size: real(terms, weight, size // 2))


def ignored_importance_weights() -> Any:
    real = losses.global_mean
    return patch.object(agents, "global_mean", lambda terms, weight, size: real(terms, torch.ones_like(weight), size))


def argmax_of_the_target_network() -> Any:
    real = losses.td_target
    return patch.object(agents, "td_target", lambda reward, discount, target, online: real(reward, discount, target))


def undiscounted_terminals() -> Any:
    real = losses.td_target

    def bootstrap_always(reward: Tensor, discount: Tensor, target: Tensor, online: Tensor) -> Tensor:
        return real(reward, discount.clamp(min=0.1), target, online)

    return patch.object(agents, "td_target", bootstrap_always)


def averaged_replicas() -> Any:
    real = SynchronousExchange.finish

    def average(self: SynchronousExchange) -> None:
        summed = [gradient for _, _, gradients in self._under_way for gradient in gradients]
        real(self)
        for gradient in summed:
            gradient /= 2

    return patch.object(SynchronousExchange, "finish", average)


def unreduced_replicas() -> Any:
    return patch.object(SynchronousExchange, "start", lambda self, stage, parameters: None)


def exchange_one_backward_early() -> Any:
    """The sum of a stage begins after the last action but one that adds to its gradients."""
    real = Pipeline.program

    def program(self: Pipeline, table: ActionTable) -> Program:
        whole = real(self, table)
        early: dict[Action, int] = {}
        for stage in whole.completes.values():
            adding = [a for a in whole.order if a.stage == stage and a.kind in GRADIENTS_OF_WEIGHTS]
            early[adding[-2]] = stage
        return replace(whole, completes=early)

    return patch.object(Pipeline, "program", program)


def exchange_before_the_last_weight_gradients() -> Any:
    """With a split backward: the sum begins when the last I, not the last W, has ended."""
    real = Pipeline.program

    def program(self: Pipeline, table: ActionTable) -> Program:
        whole = real(self, table)
        inputs = {a.stage: a for a in whole.order if a.kind == BACKWARD_INPUT}
        return replace(whole, completes={inputs[stage]: stage for stage in whole.completes.values()})

    return patch.object(Pipeline, "program", program)


def clip_norm_of_the_stage() -> Any:
    real = Learner._clip

    def clip(self: Learner, grad_norm: Tensor) -> None:
        real(self, nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    return patch.object(Learner, "_clip", clip)


def clip_norm_counted_for_each_replica() -> Any:
    real = Learner._clip
    return patch.object(Learner, "_clip", lambda self, norm: real(self, norm * self.plan.parallelism.data**0.5))


def stale_target_at_a_refresh() -> Any:
    return patch.object(Stage, "refresh_target", lambda self, tau: None)


def refresh_of_the_first_stage_only() -> Any:
    real = Stage.refresh_target
    return patch.object(Stage, "refresh_target", lambda self, tau: real(self, tau) if self.index == 0 else None)


def target_that_shares_the_online_weights() -> Any:
    def share(self: Stage, tau: float) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.data = online.data

    return patch.object(Stage, "refresh_target", share)


def swapped_microbatch() -> Any:
    """The labels of two micro-batches change places."""
    real = agents.Labels.rows

    def swapped(self: agents.Labels, start: int, stop: int) -> agents.Labels:
        size = stop - start
        i = start // size
        other = {0: 1, 1: 0}.get(i, i)
        return real(self, other * size, (other + 1) * size)

    return patch.object(agents.Labels, "rows", swapped)


def swapped_values() -> Any:
    """Micro-batch 1 gets micro-batch 0's target values: a slot that was not cleared."""
    real = Pipeline._forward
    kept: dict[str, Tensor] = {}

    def forward(self: Pipeline, action: Action, *rest: Any) -> Tensor:
        output = real(self, action, *rest)
        if action.kind == "T" and action.stage == self._mesh.num_stages - 1:
            if action.microbatch == 0:
                kept["T"] = output.clone()
            if action.microbatch == 1:
                return kept["T"]
        return output

    return patch.object(Pipeline, "_forward", forward)


def lost_gradient_message() -> Any:
    """A gradient message is answered by an empty one."""
    real = Mesh.send

    def send(self: Mesh, tensor: Tensor, to: int, kind: str) -> Any:
        return real(self, torch.zeros_like(tensor) if kind == "B" else tensor, to, kind)

    return patch.object(Mesh, "send", send)


def frames_of_another_update() -> Any:
    real = VirtualShards.draw
    return patch.object(VirtualShards, "draw", lambda self, size, update, owned: real(self, size, update + 1, owned))


def shard_sampled_twice() -> Any:
    return patch.object(transparency, "owned_shards", lambda case, replica: range(case.shards // case.data))


def lost_weight() -> Any:
    """One parameter is left out of the optimizer's step."""
    real = torch.optim.Adam.step

    def step(self: torch.optim.Adam, closure: Any = None) -> Any:
        self.param_groups[0]["params"][0].grad.zero_()
        return real(self, closure)

    return patch.object(torch.optim.Adam, "step", step)


def gradients_kept_from_the_last_update() -> Any:
    return patch.object(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)


def td_errors_in_reverse() -> Any:
    real = LabelExchange.return_td_errors
    return patch.object(LabelExchange, "return_td_errors", lambda self, parts: real(self, parts[::-1]))


def gradient_in_another_memory_format() -> Any:
    """A gradient's memory is sent as it lies, though the receiver reads it in other strides."""
    real = runtime._flat

    def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
        if like is not None and tensor.dim() == 4:
            tensor = tensor.contiguous()  # as autograd may well return it
            return tensor.detach().as_strided((tensor.numel(),), (1,))
        return real(tensor, like)

    return patch.object(runtime, "_flat", flat)


# What the comparison must not overlook


def gradient_that_is_not_a_number() -> Any:
    """0/0 in the gradient of one weight of the last stage."""
    real = Learner._clip

    def clip(self: Learner, grad_norm: Tensor) -> None:
        real(self, grad_norm)
        if self.has_loss and not self.owns_shards:
            next(self.parameters()).grad.mul_(torch.nan)

    return patch.object(Learner, "_clip", clip)


def gradients_freed_after_the_step() -> Any:
    """The ranks of the last stage end an update without gradients; weights and norms are right."""
    real = Learner.learn

    def learn(self: Learner, batch: Any, upcoming: Any = None) -> Any:
        step = real(self, batch, upcoming)
        if self.has_loss and not self.owns_shards:
            self.optimizer.zero_grad(set_to_none=True)
        return step

    return patch.object(Learner, "learn", learn)


def gradient_of_one_weight_freed_after_the_step() -> Any:
    """One parameter ends an update without its gradient; weights and norms are right."""
    real = Learner.learn

    def learn(self: Learner, batch: Any, upcoming: Any = None) -> Any:
        step = real(self, batch, upcoming)
        if self.has_loss and not self.owns_shards:
            next(self.parameters()).grad = None
        return step

    return patch.object(Learner, "learn", learn)
