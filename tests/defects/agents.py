"""Defects of distributions, noise, Munchausen and action dimensions.

Each function returns a patch of one name of the real code, to be entered while a layout runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import mpdqn.learner as learner_module
from mpdqn.dqn import agents, losses
from mpdqn.dqn.distributions import Categorical
from mpdqn.learner import Learner
from mpdqn.networks import NoisyLinear, noisy
from mpdqn.pipeline.labels import LabelExchange
from mpdqn.pipeline.runtime import Pipeline
from mpdqn.schedule import Action
from mpdqn.schedule.actions import RECOMPUTE


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
