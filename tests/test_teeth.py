"""The transparency tests have teeth: each of these defects, put into the real code, must be found by them.

A defect patches one name while a layout runs; the reference it is compared with stays clean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import tests.transparency as transparency
from mpdqn.dqn import agents, losses
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.launch import launch
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.pipeline import runtime
from mpdqn.pipeline.runtime import Pipeline
from mpdqn.pipeline.stage import Stage
from mpdqn.replay import VirtualShards
from tests.transparency import Case, errors, run_case, run_reference, violations

HYBRID = Case(data=2, pipeline=2, schedule="1f1b", m=4)

Defect = Callable[[], Any]


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
    real = SynchronousExchange.reduce

    def average(self: SynchronousExchange, parameters: Mapping[int, list[nn.Parameter]]) -> None:
        real(self, parameters)
        for owned in parameters.values():
            for p in owned:
                assert p.grad is not None
                p.grad /= 2

    return patch.object(SynchronousExchange, "reduce", average)


def unreduced_replicas() -> Any:
    return patch.object(SynchronousExchange, "reduce", lambda self, parameters: None)


def reduction_one_microbatch_early() -> Any:
    """What a hook does that starts the all-reduce before the last backward: the last part stays local."""
    real_backward, real_reduce = Pipeline._backward, SynchronousExchange.reduce
    before: dict[nn.Parameter, Tensor] = {}

    def backward(self: Pipeline, action: Any, loss: Tensor | None) -> Any:
        if action.microbatch == self._m - 1:
            for p in self._runner(action).submod.parameters():
                before[p] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        return real_backward(self, action, loss)

    def reduce(self: SynchronousExchange, parameters: Mapping[int, list[nn.Parameter]]) -> None:
        late = {}
        for owned in parameters.values():
            for p in owned:
                assert p.grad is not None
                late[p] = p.grad - before[p]
                p.grad.copy_(before[p])
        real_reduce(self, parameters)
        for p, part in late.items():
            assert p.grad is not None
            p.grad += part

    return _both(patch.object(Pipeline, "_backward", backward), patch.object(SynchronousExchange, "reduce", reduce))


def clip_norm_of_the_stage() -> Any:
    real = Learner._clip

    def clip(self: Learner, grad_norm: Tensor) -> None:
        real(self, nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    return patch.object(Learner, "_clip", clip)


def clip_norm_counted_for_each_replica() -> Any:
    real = Learner._clip
    return patch.object(Learner, "_clip", lambda self, norm: real(self, norm * self.plan.parallelism.data**0.5))


def stale_target_at_a_refresh() -> Any:
    return patch.object(Stage, "refresh_target", lambda self: None)


def refresh_of_the_first_stage_only() -> Any:
    real = Stage.refresh_target
    return patch.object(Stage, "refresh_target", lambda self: real(self) if self.index == 0 else None)


def target_that_shares_the_online_weights() -> Any:
    def share(self: Stage) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.data = online.data

    return patch.object(Stage, "refresh_target", share)


def swapped_microbatch() -> Any:
    """The labels of two micro-batches change places."""
    import mpdqn.learner as learner

    real = learner._rows

    def swapped(labels: agents.Labels, rows: slice) -> agents.Labels:
        size = rows.stop - rows.start
        i = rows.start // size
        other = {0: 1, 1: 0}.get(i, i)
        return real(labels, slice(other * size, (other + 1) * size))

    return patch.object(learner, "_rows", swapped)


def swapped_values() -> Any:
    """Micro-batch 1 gets micro-batch 0's target values: a slot that was not cleared."""
    real = Pipeline._forward
    kept: dict[str, Tensor] = {}

    def forward(self: Pipeline, action: Any, frames: Any, leaving: Any) -> Tensor:
        output = real(self, action, frames, leaving)
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
    real = VirtualShards.sample
    return patch.object(VirtualShards, "sample", lambda self, size, update, owned: real(self, size, update + 1, owned))


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
    real = Learner._return_td_errors
    return patch.object(Learner, "_return_td_errors", lambda self, parts: real(self, parts[::-1]))


def gradient_in_another_memory_format() -> Any:
    """A gradient's memory is sent as it lies, though the receiver reads it in other strides."""
    real = runtime._flat

    def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
        if like is not None and tensor.dim() == 4:
            tensor = tensor.contiguous()  # as autograd may well return it
            return tensor.detach().as_strided((tensor.numel(),), (1,))
        return real(tensor, like)

    return patch.object(runtime, "_flat", flat)


@contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


@dataclass(frozen=True)
class Tooth:
    """A defect, the layout in which it bites, and a quantity that must give it away."""

    defect: Defect
    case: Case
    shows_in: str


SINGLE = Case(m=4)
TEETH = (
    Tooth(missing_1_over_m, SINGLE, "gradients"),
    Tooth(missing_1_over_d, replace(HYBRID, pipeline=1), "gradients"),
    Tooth(ignored_importance_weights, HYBRID, "gradients"),
    Tooth(argmax_of_the_target_network, HYBRID, "td_errors"),
    Tooth(undiscounted_terminals, HYBRID, "td_errors"),
    Tooth(averaged_replicas, HYBRID, "gradients"),
    Tooth(unreduced_replicas, HYBRID, "gradients"),
    Tooth(reduction_one_microbatch_early, HYBRID, "gradients"),
    Tooth(clip_norm_of_the_stage, replace(HYBRID, data=1), "gradients"),
    Tooth(clip_norm_counted_for_each_replica, HYBRID, "gradients"),
    Tooth(stale_target_at_a_refresh, HYBRID, "td_errors"),
    Tooth(refresh_of_the_first_stage_only, HYBRID, "td_errors"),
    Tooth(target_that_shares_the_online_weights, SINGLE, "td_errors"),
    Tooth(swapped_microbatch, HYBRID, "td_errors"),
    Tooth(swapped_values, HYBRID, "td_errors"),
    Tooth(lost_gradient_message, HYBRID, "gradients"),
    Tooth(frames_of_another_update, HYBRID, "td_errors"),
    Tooth(shard_sampled_twice, HYBRID, "gradients"),
    Tooth(lost_weight, HYBRID, "change"),
    Tooth(gradients_kept_from_the_last_update, HYBRID, "gradients"),
    Tooth(td_errors_in_reverse, HYBRID, "td_errors"),
    Tooth(gradient_in_another_memory_format, replace(HYBRID, memory_format="channels_last"), "gradients"),
)


def bite(names: list[str]) -> list[tuple[Case, dict[str, float], dict[str, float]]]:
    """On rank 0: for each tooth the errors without and with its defect."""
    torch.set_num_threads(1)
    found = []
    by_name = {tooth.defect.__name__: tooth for tooth in TEETH}
    with World.open("cpu", 60) as world:
        for tooth in (by_name[name] for name in names):
            reference = run_reference(world, tooth.case)
            clean = errors(world, tooth.case, run_case(world, tooth.case), reference)
            with tooth.defect():
                trace = run_case(world, tooth.case)
            found.append((tooth.case, clean, errors(world, tooth.case, trace, reference)))
    return found


@pytest.fixture(scope="module")
def bitten() -> dict[str, tuple[Case, dict[str, float], dict[str, float]]]:
    names = [tooth.defect.__name__ for tooth in TEETH]
    return dict(zip(names, launch(bite, names, num_workers=4)[0], strict=True))


@pytest.mark.parametrize("tooth", TEETH, ids=lambda tooth: tooth.defect.__name__)
def test_defect_is_found(tooth: Tooth, bitten: dict[str, tuple[Case, dict[str, float], dict[str, float]]]) -> None:
    case, clean, defective = bitten[tooth.defect.__name__]
    assert violations(case, clean) == []
    assert any(line.startswith(tooth.shows_in) for line in violations(case, defective)), defective


def test_there_are_enough_teeth() -> None:
    assert len({tooth.defect.__name__ for tooth in TEETH}) >= 12
