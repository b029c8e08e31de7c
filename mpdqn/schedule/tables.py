"""`ActionTable`: a schedule as data. The actions of every lane of a pipeline, in order.

One Double DQN step with p = 2 stages and m = 2 micro-batches, time to the right (· waits):

    gpipe   lane 0  T0 T1 D0 D1 F0 F1  ·  ·  · B0 B0 B1 B1
            lane 1   · T0 T1 D0 D1 F0 F1 B0 B0 B1 B1  ·  ·

A lane is what one rank of a pipeline runs: one stage, or several where stages are virtual (0 and 2 on lane 0, 1 and 3
on lane 1). A table can be printed, compared line by line, written as CSV and read again, simulated, and executed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from mpdqn.schedule.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    GRADIENTS_OF_INPUT,
    RECOMPUTE,
    TRAINING,
    Action,
)

Lane = tuple[Action, ...]


@dataclass(frozen=True)
class ActionTable:
    """The actions of each lane of one step, in order.

    ``passes`` are the letters of the no-gradient passes over this step's batch: the loss at the last stage needs their
    values. ``ahead`` are those over the *next* step's batch: nothing in this step needs them.
    """

    schedule: str
    lanes: tuple[Lane, ...]
    passes: str = ""
    ahead: str = ""

    @cached_property
    def actions(self) -> Set[Action]:
        """Every action of the table."""
        return frozenset(itertools.chain.from_iterable(self.lanes))

    @cached_property
    def num_stages(self) -> int:
        """The number of stages, over all lanes."""
        return 1 + max((action.stage for action in self.actions), default=-1)

    @cached_property
    def num_microbatches(self) -> int:
        """m, the number of micro-batches."""
        return 1 + max((action.microbatch for action in self.actions), default=-1)

    @cached_property
    def lane_of(self) -> tuple[int, ...]:
        """The lane of each stage."""
        owner = {action.stage: lane for lane, actions in enumerate(self.lanes) for action in actions}
        return tuple(owner.get(stage, -1) for stage in range(self.num_stages))

    def stages_of(self, lane: int) -> tuple[int, ...]:
        """The stages of lane ``lane``, ascending."""
        return tuple(stage for stage, owner in enumerate(self.lane_of) if owner == lane)

    def takes_loss(self, action: Action) -> bool:
        """Whether the loss is computed at the end of ``action``: the last stage's forward that keeps a graph."""
        if action.stage != self.num_stages - 1 or action.kind not in (FORWARD, RECOMPUTE):
            return False
        return action.kind == RECOMPUTE or action._replace(kind=RECOMPUTE) not in self.actions

    def result_goes_to(self, action: Action) -> Action | None:
        """The action of the neighbouring stage that needs what ``action`` computes; None if there is none."""
        stage, kind, i = action
        if kind in (BACKWARD_WEIGHT, RECOMPUTE):
            return None
        if kind in GRADIENTS_OF_INPUT:
            return next((a for k in GRADIENTS_OF_INPUT if (a := Action(stage - 1, k, i)) in self.actions), None)
        return Action(stage + 1, kind, i) if stage + 1 < self.num_stages else None

    def dependencies(self, action: Action) -> list[Action]:
        """The actions of this step that must have ended before ``action`` can start."""
        stage, kind, i = action
        if kind == BACKWARD_WEIGHT:
            return [Action(stage, BACKWARD_INPUT, i)]
        if kind == RECOMPUTE:
            needed = [Action(stage, FORWARD, i)]
        elif kind in GRADIENTS_OF_INPUT:
            again = Action(stage, RECOMPUTE, i)
            needed = [again if again in self.actions else Action(stage, FORWARD, i)]
            if stage + 1 < self.num_stages:
                split = Action(stage + 1, BACKWARD_INPUT, i)
                needed.append(split if split in self.actions else Action(stage + 1, BACKWARD, i))
        else:
            needed = [Action(stage - 1, kind, i)] if stage > 0 else []
        if self.takes_loss(action):
            needed += [Action(stage, letter, i) for letter in self.passes]
        return needed

    @cached_property
    def needs(self) -> Mapping[Action, list[Action]]:
        """`dependencies` of every action of the table."""
        return {action: self.dependencies(action) for action in self.actions}

    def without_ahead(self) -> ActionTable:
        """This table without its passes over the next batch."""
        lanes = tuple(tuple(a for a in lane if a.kind not in self.ahead) for lane in self.lanes)
        return ActionTable(self.schedule, lanes, self.passes)

    def only_ahead(self) -> ActionTable:
        """The passes over the next batch alone, micro-batch by micro-batch, as they run when they may not run ahead."""
        lanes = tuple(
            tuple(sorted((a for a in lane if a.kind in self.ahead), key=lambda a: (a.microbatch, a.stage)))
            for lane in self.lanes
        )
        return ActionTable(self.schedule, lanes, "", self.ahead)

    def check(self) -> Self:
        """This table, if it is one step of a pipeline and can run.

        Raises:
            ValueError: naming the first action that is missing, too many or impossible.
        """
        if not self.actions:
            raise ValueError(f"the table of {self.schedule} has {len(self.lanes)} lanes and 0 actions; write some")
        for action, count in Counter(itertools.chain.from_iterable(self.lanes)).items():
            if count > 1:
                raise ValueError(f"the table has {action} {count} times; an action is done once")
            if action.kind not in (*TRAINING, *self.passes, *self.ahead):
                raise ValueError(
                    f"the table has {action} but {action.kind} is none of the passes it names "
                    f"({self.passes + self.ahead or 'none'}); name it"
                )
        for lane, actions in enumerate(self.lanes):
            for action in actions:
                if self.lane_of[action.stage] != lane:
                    raise ValueError(
                        f"the table has {action} on lane {lane} but stage {action.stage} is on another, too"
                    )
        for stage, i in itertools.product(range(self.num_stages), range(self.num_microbatches)):
            has = {a.kind for kind in TRAINING if (a := Action(stage, kind, i)) in self.actions}
            for kind in (FORWARD, *self.passes, *self.ahead):
                if Action(stage, kind, i) not in self.actions:
                    raise ValueError(f"the table lacks {stage}{kind}{i}")
            if has - {FORWARD, RECOMPUTE} not in ({BACKWARD}, {BACKWARD_INPUT, BACKWARD_WEIGHT}):
                found = " and ".join(f"{stage}{kind}{i}" for kind in TRAINING[2:] if kind in has) or "none"
                raise ValueError(
                    f"stage {stage} needs for micro-batch {i} either {stage}B{i} or both {stage}I{i} and {stage}W{i}, "
                    f"but the table has {found}"
                )
        self.rank_order(range(self.num_stages), 0)
        return self

    def rank_order(self, owners: Sequence[int], rank: int) -> Lane:
        """The order in which ``rank`` runs the actions of all lanes it holds.

        The whole table is played tick by tick, one action per rank and tick. Each lane keeps its own order; of several
        lanes on one rank the last that is ready goes first, so that a micro-batch is carried on as far as it can be.
        Every rank plays the same table, so the orders of the ranks fit together and cannot wait for one another in a
        ring.

        Args:
            owners: the rank that holds each stage; the stages of a lane have the same.
            rank: whose order is asked.

        Raises:
            ValueError: if the table cannot run, naming the first impossible action.
        """
        position = [0] * len(self.lanes)
        done: set[Action] = set()
        order: list[Action] = []
        while any(position[lane] < len(actions) for lane, actions in enumerate(self.lanes)):
            tick: dict[int, tuple[int, Action]] = {}
            for lane, actions in enumerate(self.lanes):
                if position[lane] == len(actions):
                    continue
                action = actions[position[lane]]
                if done.issuperset(self.needs[action]):
                    # a later lane replaces an earlier one of the same rank
                    tick[owners[action.stage]] = lane, action
            if not tick:
                stuck, missing = self._impossible(position, done)
                raise ValueError(f"the table cannot run: {stuck} waits for {missing}, which cannot come before it")
            for owner, (lane, action) in tick.items():
                position[lane] += 1
                done.add(action)
                if owner == rank:
                    order.append(action)
        return tuple(order)

    def _impossible(self, position: Sequence[int], done: Set[Action]) -> tuple[Action, Action]:
        """Where nothing can go on: the first action that waits in vain, and for what.

        A lane is at fault that waits for a later action of its own, or for one that is in no lane; the others may only
        be waiting for it.
        """
        waiting = [
            (action, needed)
            for lane, actions in enumerate(self.lanes)
            for action in actions[position[lane] : position[lane] + 1]
            for needed in self.dependencies(action)
            if needed not in done
        ]
        return next(
            (
                (stuck, missing)
                for stuck, missing in waiting
                if missing not in self.actions or self.lane_of[stuck.stage] == self.lane_of[missing.stage]
            ),
            waiting[0],
        )

    def __str__(self) -> str:
        """One line for each lane."""
        return "".join(" ".join(map(str, lane)) + "\n" for lane in self.lanes)

    def to_csv(self) -> str:
        """This table as text: a line that names it, then one line of actions for each lane; `from_csv` reads it."""
        head = f"# schedule={self.schedule} passes={self.passes} ahead={self.ahead}\n"
        return head + "".join(",".join(map(str, lane)) + "\n" for lane in self.lanes)

    @classmethod
    def from_csv(cls, text: str) -> Self:
        """The table that `to_csv` wrote, or one of torch.distributed.pipelining (empty cells are waits).

        Raises:
            ValueError: for a cell that is no action, with its line, or a table that cannot run.
        """
        head: dict[str, str] = {}
        lanes = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("#"):
                head |= dict(part.split("=", 1) for part in line[1:].split() if "=" in part)
                continue
            try:
                lanes.append(tuple(Action.parse(cell.strip()) for cell in line.split(",") if cell.strip()))
            except ValueError as error:
                raise ValueError(f"line {number} of the table: {error}") from None
        return cls(head.get("schedule", "custom"), tuple(lanes), head.get("passes", ""), head.get("ahead", "")).check()
