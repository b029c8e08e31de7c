"""`EmulatedRow`: one row of an emulated experiment, as data: what runs, in which order, and what the simulator says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from mpdqn.bench.emulated import StageSeconds, emulated_times
from mpdqn.dqn.agents import Agent
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.planner.order import best_table
from mpdqn.planner.simulate import Pace, pace, simulate
from mpdqn.records import Value
from mpdqn.schedule import ActionTable, ActionTimes, lane_of_stages
from mpdqn.timeline import Timeline

SETTLING = 2
"""Steps after which a simulated run is steady."""


@dataclass(frozen=True, kw_only=True)
class EmulatedRow:
    """A pipeline of p ranks over emulated stages.

    ``agent`` is what the ordinary `Learner` trains there, with ``lookahead = 1``; with None there is no target network
    and no learner, only F and B. ``recompute`` runs every forward again before its backward.
    """

    name: str
    schedule: str
    pipeline: int
    num_microbatches: int
    stages: tuple[StageSeconds, ...]
    batch_size: int
    agent: Agent | None = None
    recompute: bool = False

    @property
    def letters(self) -> str:
        """The agent's no-gradient passes."""
        return self.agent.letters if self.agent else ""

    @cached_property
    def plan(self) -> Plan:
        """Stage by stage on p ranks, one layer each."""
        virtual, count = len(self.stages) // self.pipeline, len(self.stages)
        return Plan.rectangular(
            Partition(boundaries=tuple(range(count + 1))),
            Parallelism(
                pipeline=self.pipeline,
                num_microbatches=self.num_microbatches,
                schedule=self.schedule,
                virtual=virtual,
            ),
            lanes=lane_of_stages(self.schedule, self.pipeline, virtual),
            recompute=("all",) * count if self.recompute else (),
        )

    @cached_property
    def times(self) -> ActionTimes:
        """Seconds of its actions."""
        return emulated_times(self.stages, self.letters)

    @cached_property
    def table(self) -> ActionTable:
        """Its step: for real devices the planner would choose the same with the same times."""
        return best_table(
            self.schedule,
            self.pipeline,
            self.num_microbatches,
            self.letters,
            ahead=self.agent.frozen_letters if self.agent else "",
            times=self.times,
            virtual=self.plan.parallelism.virtual,
            recompute=range(len(self.stages)) if self.recompute else (),
        )

    @cached_property
    def work_s(self) -> float:
        """Seconds of work of all ranks in a step."""
        return sum(map(self.times.of, self.table.actions))

    @cached_property
    def simulated(self) -> Pace:
        """Its steady pace with free messages and updates."""
        return pace(self.table, self.times)

    def simulated_timeline(self, steps: int) -> Timeline:
        """``steps`` steps in a row, once they have settled, counted from 0."""
        timeline = simulate(self.table, self.times, steps=SETTLING + steps)
        spans = tuple(replace(s, step=s.step - SETTLING) for s in timeline.spans if s.step >= SETTLING)
        return Timeline(spans, timeline.seconds)

    @property
    def settings(self) -> dict[str, Value]:
        """What a record says of it."""
        return {
            "emulated": True,
            "schedule": self.schedule,
            "agent": self.agent.name if self.agent else "",
            "pipeline": self.pipeline,
            "num_microbatches": self.num_microbatches,
            "batch_size": self.batch_size,
            "recompute": self.recompute,
            "forward_s": [stage.forward_s for stage in self.stages],
            "backward_input_s": [stage.backward_input_s for stage in self.stages],
            "backward_weight_s": [stage.backward_weight_s for stage in self.stages],
        }
