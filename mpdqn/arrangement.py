"""`Arrangement`: all that follows from a layout and a profile before it runs.

layout, profile ─▶ cut into p·v stages ─▶ recomputation of each ─▶ action table, ordered by the profiled times
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from mpdqn.dqn.agents import Agent
from mpdqn.layouts import Layout
from mpdqn.partition import balance
from mpdqn.plan import RECOMPUTATION, Partition, Plan, Profile
from mpdqn.planner.costs import action_times, stages_run_again
from mpdqn.planner.order import best_table
from mpdqn.planner.recompute import choose_recomputation
from mpdqn.planner.simulate import pace, simulate
from mpdqn.schedule import ActionTable, ActionTimes
from mpdqn.timeline import Timeline

COPIES_OF_PARAMETERS = 5
"""A stage holds its parameters, their gradients, Adam's two moments and the target network."""

MIB = 2**20


class NothingFits(ValueError):
    """A layout that no recomputation brings below the memory limit; every rank comes to the same one."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How one layout runs: its plans (one for each copy), the table of a step, and the times it was ordered by."""

    layout: Layout
    plans: tuple[Plan, ...]
    table: ActionTable
    times: ActionTimes

    @classmethod
    def of(
        cls, layout: Layout, profile: Profile, agent: Agent, *, batch_size: int, lookahead: int, recompute: str,
        memory_bytes: float,
    ) -> Self:  # fmt: skip
        """The arrangement of ``layout``, the same on every rank.

        Args:
            layout: what is asked.
            profile: the layers, on a micro-batch of any size; times and sizes are taken in proportion.
            agent: which passes a step has.
            batch_size: transitions of an update over all replicas.
            lookahead: 0 or 1, see `LearnerConfig`.
            recompute: one of `RECOMPUTATION` for every stage, or ``auto``: what fits in the least time.
            memory_bytes: what one rank may use.

        Raises:
            NothingFits: if ``auto`` finds nothing that fits.
        """
        parallelism = layout.parallelism
        cut = balance(profile, parallelism.num_stages, forward_passes=1 + len(agent.passes))
        micro = scaled(profile, batch_size / (layout.data * layout.num_microbatches))
        p, m, v = layout.pipeline, layout.num_microbatches, layout.virtual
        ahead = agent.frozen_letters if lookahead else ""
        modes = (recompute,) * parallelism.num_stages
        if recompute not in RECOMPUTATION:
            left = _left_for_activations(layout, profile, cut, memory_bytes)
            try:
                modes = choose_recomputation(
                    micro,
                    cut,
                    schedule=layout.schedule,
                    num_lanes=p,
                    num_microbatches=m,
                    passes=agent.letters,
                    ahead=ahead,
                    virtual=v,
                    memory_bytes=left,
                )
            except ValueError as error:
                raise NothingFits(
                    f"layout {layout.name} does not fit into {memory_bytes / MIB:.1f} MiB a rank, parameters included: "
                    f"{error}"
                ) from error
        times = action_times(micro, cut, agent.letters, modes)
        table = best_table(
            layout.schedule,
            p,
            m,
            agent.letters,
            ahead=ahead,
            times=times,
            virtual=v,
            recompute=stages_run_again(modes),
        )
        return cls(
            layout=layout,
            plans=tuple(layout.plans(cut, modes)),
            table=table,
            times=times,
        )

    @property
    def bubble(self) -> float:
        """The share of a step in which a rank waits, by simulation of equal stages and free messages."""
        if len(set(self.owners)) == 1:
            return 0.0
        n = self.table.num_stages
        even = ActionTimes(seconds={kind: (sum(t) / n,) * n for kind, t in self.times.seconds.items()})
        return max(0.0, 1 - pace(self.table, even, owners=self.owners).mean_utilisation)

    @property
    def owners(self) -> Sequence[int]:
        """The rank of each stage in the first replica."""
        return self.plans[0].replica(0)

    def simulated(self, steps: int, update_s: float) -> Timeline:
        """``steps`` steps of the first replica as the profile says that they go, with free messages."""
        return simulate(self.table, self.times, owners=self.owners, steps=steps, update_s=update_s)


def scaled(profile: Profile, batch_size: float) -> Profile:
    """``profile`` as it would be on ``batch_size`` rows, if times and sizes were in proportion to them."""
    factor = batch_size / profile.batch_size
    if factor == 1:
        return profile
    layers = tuple(
        replace(
            layer,
            forward_ms=layer.forward_ms * factor,
            backward_input_ms=layer.backward_input_ms * factor,
            backward_weight_ms=layer.backward_weight_ms * factor,
            activation_bytes=round(layer.activation_bytes * factor),
            boundary_bytes=round(layer.boundary_bytes * factor),
        )
        for layer in profile.layers
    )
    return replace(profile, batch_size=round(batch_size), layers=layers)


def check_parameters(layout: Layout, parameter_bytes: float, memory_bytes: float) -> None:
    """Raise NothingFits unless ``parameter_bytes`` of parameters, and all that Adam needs for them, fit on a rank."""
    held = COPIES_OF_PARAMETERS * parameter_bytes
    if held >= memory_bytes:
        raise NothingFits(
            f"layout {layout.name} has a rank whose parameters, their gradients, Adam's moments and the target network "
            f"take at least {held / MIB:.1f} MiB but its memory limit is {memory_bytes / MIB:.1f} MiB; raise it or "
            "use more stages"
        )


def _left_for_activations(layout: Layout, profile: Profile, cut: Partition, memory_bytes: float) -> list[float]:
    """What parameters leave of a rank's memory, by lane; the lanes of a stacked replica share one rank's.

    The buffers of messages, one of each cut's size for every micro-batch and pass, are not counted.
    """
    plan = layout.plans(cut)[0]
    share = layout.pipeline if layout.stacked else 1
    left = []
    for rank in range(layout.pipeline):
        stages = range(cut.num_stages) if layout.stacked else plan.stages_of(rank)
        held = sum(profile.layers[k].parameter_bytes for j in stages for k in cut.layers_of(j))
        check_parameters(layout, held, memory_bytes)
        left.append((memory_bytes - COPIES_OF_PARAMETERS * held) / share)
    return left
