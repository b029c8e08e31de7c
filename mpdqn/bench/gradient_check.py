"""`GradientCheck`: whether a layout computes what the single process computes, in plain float32.

Every layout is checked in float32 without TF32 and without compilation, whatever it is timed in: TF32 rounds to 10 bits
and bfloat16 to 7, differently for every shape of a micro-batch, so that a wrong layout could not be told from rounding.
What is checked is the cut, the schedule and the reductions, which are the same in every precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpdqn.bench.turn import Turn
from mpdqn.layouts import Layout
from mpdqn.learner import LearnerConfig, gather_by_name
from mpdqn.mesh import World
from mpdqn.records import Value

PROBED = 2
"""Updates of a probe: the second one has target values that ran ahead, if any do."""


def probe_config(config: LearnerConfig) -> LearnerConfig:
    """Return ``config`` without clipping, so that the scale of gradients shows, and with weights that hardly move, so
    that a second update shows rounding as the first does."""
    return replace(config, max_grad_norm=float("inf"), learning_rate=1e-12)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """TD errors of this rank (None without shards) and, on rank 0, all gradients of the last of `PROBED` updates."""

    td_errors: Tensor | None
    gradients: Mapping[str, Tensor]

    @classmethod
    def of(cls, turn: Turn) -> Probe:
        """Probe a layout. Collective over its ranks."""
        td_errors = [turn.learn(update).td_errors for update in range(PROBED)][-1]
        gradients = {name: p.grad for name, p in turn.learner.named_parameters() if p.grad is not None}
        return cls(
            td_errors=None if td_errors is None else td_errors.cpu(), gradients=gather_by_name(turn.learner, gradients)
        )


def errors(world: World, layout: Layout, probe: Probe | None, reference: Probe | None) -> dict[str, Value]:
    """Return, on rank 0, how far ``probe`` is from ``reference``. Collective over ``world``.

    Args:
        world: all ranks.
        layout: the one that was probed.
        probe: this rank's; None without a part in the layout.
        reference: that of the single process, on rank 0; None elsewhere.
    """
    parts = world.to_first(None if probe is None else probe.td_errors)
    if reference is None or reference.td_errors is None:
        return {}
    first_copy = [part for part in parts[: layout.ranks // layout.copies] if part is not None]
    return {
        "gradient_error": relative_error({} if probe is None else probe.gradients, reference.gradients),
        "td_error_error": relative_error({"": torch.cat(first_copy)}, {"": reference.td_errors}),
    }


def relative_error(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return ‖a − b‖₂ / ‖b‖₂ over all tensors together, in float64.

    Infinity if their names or shapes differ, if ``b`` is all zero, or if a number is not finite.
    """
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in b):
        return float("inf")
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    size = sum(float(t.double().square().sum()) for t in b.values())
    error = (difference / size) ** 0.5 if size else float("inf")
    return error if math.isfinite(error) else float("inf")
