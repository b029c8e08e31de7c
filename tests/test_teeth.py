"""The transparency tests have teeth: each of these defects, put into the real code, must be found by them.

A defect patches one name while a layout runs; the reference it is compared with stays clean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import mpdqn.learner as learner_module
import tests.transparency as transparency
from mpdqn.dqn import agents, losses
from mpdqn.dqn.distributions import Categorical
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.launch import launch
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.networks import NoisyLinear, noisy
from mpdqn.pipeline import runtime
from mpdqn.pipeline.labels import LabelExchange
from mpdqn.pipeline.runtime import Pipeline, Program, Values, _StaticStage
from mpdqn.pipeline.stage import Stage
from mpdqn.replay import VirtualShards
from mpdqn.schedule import Action, ActionTable
from mpdqn.schedule.actions import BACKWARD_INPUT, GRADIENTS_OF_WEIGHTS, RECOMPUTE
from tests.transparency import Case, Trace, errors, run_case, run_reference, tiny_case, violations

HYBRID = Case(data=2, pipeline=2, schedule="1f1b", m=4)
AHEAD = tiny_case("td1f1b", lookahead=1)
SPLIT = tiny_case("tdzb", lookahead=1)
AGAIN = tiny_case("1f1b", pipeline=3, recompute="all")
SOFT = tiny_case("td1f1b", lookahead=1, target_tau=0.25)
PARTS = tiny_case("td1f1b", data=2, lookahead=1, accumulation=2)

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


# What schedules, recomputation, lookahead, soft updates and accumulation add


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
    real = _StaticStage.backward_weight_one_chunk

    def backward_weight(self: _StaticStage, i: int) -> None:
        if i != 1:
            real(self, i)

    return patch.object(_StaticStage, "backward_weight_one_chunk", backward_weight)


def weight_gradients_twice() -> Any:
    real = _StaticStage.backward_weight_one_chunk

    def backward_weight(self: _StaticStage, i: int) -> None:
        parameters = list(self.submod.parameters())
        before = [0 if p.grad is None else p.grad.clone() for p in parameters]
        real(self, i)
        for p, old in zip(parameters, before, strict=True):
            if i == 2 and p.grad is not None:
                p.grad += p.grad - old

    return patch.object(_StaticStage, "backward_weight_one_chunk", backward_weight)


def split_that_loses_the_gradient_of_the_input() -> Any:
    real = _StaticStage.backward_input

    def backward_input(self: _StaticStage, i: int, loss: Tensor | None) -> Tensor | None:
        gradient = real(self, i, loss)
        return gradient if gradient is None else torch.zeros_like(gradient)

    return patch.object(_StaticStage, "backward_input", backward_input)


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


# What distributions, noise, Munchausen and action dimensions add


def noise_drawn_in_the_order_of_execution() -> Any:
    """Every forward of a noisy layer draws its own noise, as layers that know nothing of names do."""
    draw = torch.Generator().manual_seed(0)

    def forward(self: NoisyLinear, x: Tensor) -> Tensor:
        noise_in, noise_out = (torch.randn(n, generator=draw).to(x) for n in (self.in_features, self.out_features))
        weight = self.weight + self.weight_sigma * torch.outer(noise_out, noise_in)
        return nn.functional.linear(x, weight, self.bias + self.bias_sigma * noise_out)

    return patch.object(NoisyLinear, "forward", forward)


def noise_named_by_the_place_in_the_stage() -> Any:
    """Layers are counted from 0 in every stage: the name of a layer's noise depends on the cut."""
    real = noisy.noisy_layers

    def counted(network: nn.Module) -> dict[str, NoisyLinear]:
        return {str(k): layer for k, layer in enumerate(real(network).values())}

    return patch.object(noisy, "noisy_layers", counted)


def target_noise_of_this_update_for_the_next_batch() -> Any:
    """Passes that run ahead see the noise of the update in which they run, not of the one that uses them."""
    real = Learner._set_noise
    return patch.object(Learner, "_set_noise", lambda self, which, update: real(self, which, self.update))


def late_passes_with_the_noise_of_the_next_update() -> Any:
    real = Learner._set_noise

    def early(self: Learner, which: Any, update: int) -> None:
        real(self, which, self.update + (which == "target"))

    return patch.object(Learner, "_set_noise", early)


def one_noise_for_both_networks() -> Any:
    real = learner_module.set_noise
    return patch.object(learner_module, "set_noise", lambda net, seed, update, which: real(net, seed, update, "online"))


def noise_of_another_seed() -> Any:
    real = learner_module.set_noise
    return patch.object(
        learner_module, "set_noise", lambda net, seed, update, which: real(net, seed + 1, update, which)
    )


def recomputed_under_other_noise() -> Any:
    real = Pipeline._forward

    def forward(self: Pipeline, action: Action, *rest: Any) -> Tensor:
        if action.kind == RECOMPUTE:
            noisy.set_noise(self._runner(action).submod, 0, action.microbatch, "recomputation")
        return real(self, action, *rest)

    return patch.object(Pipeline, "_forward", forward)


def log_policy_of_the_next_observation() -> Any:
    return patch.object(agents, "LOG_POLICY", replace(agents.LOG_POLICY, frames="next_obs"))


def log_policy_of_the_online_network() -> Any:
    return patch.object(agents, "LOG_POLICY", replace(agents.LOG_POLICY, network="online"))


def cross_entropy_as_the_mean_of_the_rows_here() -> Any:
    """The mean over a micro-batch, summed: a loss m·d times too large."""
    return patch.object(agents, "global_mean", lambda terms, weight, size: (terms * weight).mean())


def projection_of_the_microbatch_before() -> Any:
    """A target distribution is written where the last one still lies."""
    real = Categorical.project
    kept: list[Tensor] = []

    def project(self: Categorical, points: Tensor, masses: Tensor) -> Tensor:
        kept.append(real(self, points, masses))
        return kept[max(0, len(kept) - 2)]

    return patch.object(Categorical, "project", project)


def atoms_of_another_action() -> Any:
    """The target takes the atoms of the action beside the best one."""
    real = agents._of_action

    def of_action(output: Tensor, action: Tensor) -> Tensor:
        return real(output, action if output.requires_grad else (action + 1) % output.shape[1])

    return patch.object(agents, "_of_action", of_action)


def next_value_of_the_online_network() -> Any:
    """Double's selector is valued by itself."""
    real = losses.td_target

    def own(reward: Tensor, discount: Tensor, target: Tensor, online: Tensor) -> Tensor:
        return real(reward, discount, online)

    return patch.object(agents, "td_target", own)


def action_dimensions_in_reverse() -> Any:
    real = LabelExchange._actions
    return patch.object(LabelExchange, "_actions", lambda self, batch: real(self, batch).flip(1))


def sum_over_action_dimensions() -> Any:
    real = losses.value_of

    def summed(q: Tensor, action: Tensor) -> Tensor:
        return real(q, action) * (action.shape[1] if action.dim() > 1 else 1)

    return patch.object(losses, "value_of", summed)


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
    Tooth(exchange_one_backward_early, HYBRID, "gradients"),
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
    Tooth(exchange_before_the_last_weight_gradients, replace(SPLIT, data=2), "gradients"),
    Tooth(refresh_that_keeps_the_passes_ahead_of_it, AHEAD, "td_errors"),
    Tooth(values_of_before_the_refresh, AHEAD, "td_errors"),
    Tooth(gaps_filled_with_this_batch, AHEAD, "td_errors"),
    Tooth(swapped_values_of_the_next_batch, AHEAD, "td_errors"),
    # Rainbow's noise makes other choices in each step.
    Tooth(values_of_the_step_before, replace(AHEAD, agent="rainbow"), "td_errors"),
    Tooth(lost_weight_gradients_of_a_microbatch, SPLIT, "gradients"),
    Tooth(weight_gradients_twice, tiny_case("zbv"), "gradients"),
    Tooth(split_that_loses_the_gradient_of_the_input, SPLIT, "gradients"),
    Tooth(recomputed_from_the_frames_of_another_microbatch, AGAIN, "gradients"),
    Tooth(recomputed_from_what_another_microbatch_received, AGAIN, "gradients"),
    Tooth(recomputed_with_other_weights, AGAIN, "gradients"),
    Tooth(soft_update_that_copies, SOFT, "td_errors"),
    Tooth(soft_update_the_other_way_round, SOFT, "td_errors"),
    Tooth(labels_of_the_first_part_for_all, PARTS, "td_errors"),
    Tooth(frames_of_the_first_part_for_all, PARTS, "td_errors"),
    Tooth(gradients_of_the_last_part_only, PARTS, "gradients"),
    Tooth(reduced_in_every_part, PARTS, "gradients"),
    Tooth(noise_drawn_in_the_order_of_execution, tiny_case("1f1b", agent="noisy_dqn"), "gradients"),
    Tooth(noise_named_by_the_place_in_the_stage, tiny_case("1f1b", pipeline=3, agent="rainbow"), "gradients"),
    Tooth(target_noise_of_this_update_for_the_next_batch, replace(AHEAD, agent="noisy_dqn"), "td_errors"),
    Tooth(late_passes_with_the_noise_of_the_next_update, replace(AHEAD, agent="noisy_dqn"), "td_errors"),
    Tooth(one_noise_for_both_networks, tiny_case("1f1b", agent="rainbow"), "td_errors"),
    Tooth(noise_of_another_seed, tiny_case("1f1b", agent="noisy_dqn"), "gradients"),
    Tooth(recomputed_under_other_noise, tiny_case("1f1b", agent="noisy_dqn", recompute="all"), "gradients"),
    Tooth(log_policy_of_the_next_observation, replace(AHEAD, agent="munchausen_dqn"), "td_errors"),
    Tooth(log_policy_of_the_online_network, tiny_case("1f1b", agent="munchausen_dqn"), "td_errors"),
    Tooth(cross_entropy_as_the_mean_of_the_rows_here, tiny_case("1f1b", data=2, agent="c51"), "gradients"),
    Tooth(projection_of_the_microbatch_before, tiny_case("1f1b", data=2, agent="c51"), "td_errors"),
    Tooth(atoms_of_another_action, tiny_case("1f1b", agent="rainbow"), "td_errors"),
    Tooth(next_value_of_the_online_network, tiny_case("1f1b", agent="dueling_dqn"), "td_errors"),
    Tooth(action_dimensions_in_reverse, tiny_case("1f1b", agent="decqn"), "td_errors"),
    Tooth(sum_over_action_dimensions, tiny_case("1f1b", data=2, agent="decqn"), "td_errors"),
)


def bite(names: list[str]) -> list[tuple[Case, dict[str, float], dict[str, float]]]:
    """On rank 0: for each tooth the errors without and with its defect."""
    torch.set_num_threads(1)
    found = []
    by_name = {tooth.defect.__name__: tooth for tooth in TEETH}
    references: dict[Case, tuple[Trace, dict[str, float]]] = {}
    with World.open("cpu", 60) as world:
        for tooth in (by_name[name] for name in names):
            if tooth.case not in references:
                reference = run_reference(world, tooth.case)
                references[tooth.case] = reference, errors(world, tooth.case, run_case(world, tooth.case), reference)
            reference, clean = references[tooth.case]
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
    assert len({tooth.defect.__name__ for tooth in TEETH}) == len(TEETH) >= 12
