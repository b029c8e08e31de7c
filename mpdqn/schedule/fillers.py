"""Passes that fill the bubble: work that nothing in this step waits for, put where a lane would wait.

Between two target updates the target network is frozen, so the next batch's target forwards T depend on nothing that
this step computes. p = 2, m = 4, Double DQN, one unit for F, D and T, two for B (lane 1 begins a unit later):

    lane 0  D0 D1 D2 D3 F0 F1 T0 T1 B0-- F2 B1-- F3 T2 B2-- B3-- T3
    lane 1     D0 D1 D2 D3 F0 B0-- F1 B1-- F2 B2-- F3 B3-- T0 T1 T2 T3

In a longer pipeline all lanes begin to wait at about the same time. Each finds work then only if the lane before it is
a pass ahead; so lane j may begin its step with ``lead − j`` of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mpdqn.schedule.actions import GRADIENTS_OF_WEIGHTS, Action
from mpdqn.schedule.tables import ActionTable
from mpdqn.schedule.times import ActionTimes, play

SLACKS = (0.0, 0.5, 1.0)
"""By which share of its own time a filler may be too long for its gap; where times differ, 0 need not be best."""

CLOSE = 1.001
"""A step this close to the work of its busiest lane is not searched further; no measurement would show the rest."""


def best_fill(table: ActionTable, letters: str, times: ActionTimes) -> ActionTable:
    """``table`` with the passes ``letters`` over the next batch where they make steps follow one another fastest."""
    best, fastest = table, float("inf")
    p = len(table.lanes)
    for slack, lead in itertools.product(SLACKS, range(0, max(1, p - 1), max(1, (p - 1) // 3))):
        filled = fill(table, letters, times, lead=lead, slack=slack)
        step = period(filled, times)
        if step < fastest:
            best, fastest = filled, step
        if step <= CLOSE * busiest(filled, times):
            break
    return best


def busiest(table: ActionTable, times: ActionTimes) -> float:
    """The work of the lane that has most, in a step: no order makes steps follow one another faster."""
    return max(sum(map(times.of, lane)) for lane in table.lanes)


def fill(table: ActionTable, letters: str, times: ActionTimes, *, lead: int = 0, slack: float = 0.0) -> ActionTable:
    """``table`` with the passes ``letters`` over the next batch in its gaps; what fits nowhere comes last.

    Micro-batch by micro-batch, each stage takes the first gap in which the pass has arrived and fits.

    Args:
        table: one step, whose order is kept.
        letters: the passes to put in.
        times: how long each action takes; only their ratios matter.
        lead: how many of them lane 0 runs before anything else; each lane one fewer than the lane before.
        slack: by which share of its own time, 0 … 1, a pass may be too long for its gap, and put off what follows.
    """
    lanes: Sequence[Sequence[Action]] = table.lanes
    needs = dict(table.needs)
    for letter in letters:
        needs |= {
            Action(stage, letter, i): [Action(stage - 1, letter, i)] if stage else []
            for stage in range(table.num_stages)
            for i in range(table.num_microbatches)
        }
        leads = [
            [
                Action(s, letter, i)
                for i in range(min(lead - lane, table.num_microbatches))
                for s in table.stages_of(lane)
            ]
            for lane in range(len(lanes))
        ]
        # What a lane waits before its first action of this step is no gap: it still ends the step before.
        last = [order[0] for order in lanes]
        line = _Line([[*led, *order] for led, order in zip(leads, lanes, strict=True)], needs, times)
        for i in range(table.num_microbatches):
            arrived = 0.0
            for stage, lane in enumerate(table.lane_of):
                action = Action(stage, letter, i)
                if action not in line.when:
                    last[lane] = line.gap(last[lane], arrived, (1 - slack) * times.of(action))
                    line.insert(action, last[lane], arrived)
                    last[lane] = action
                arrived = line.when[action][1]
        lanes = line.lanes
    return replace(table, lanes=tuple(map(tuple, lanes)), ahead=table.ahead + letters)


class _Line:
    """Lanes that more is put into: what follows what, and when each action starts and ends."""

    def __init__(
        self, lanes: Sequence[Sequence[Action]], needs: Mapping[Action, Sequence[Action]], times: ActionTimes
    ) -> None:
        self.first = [lane[0] for lane in lanes]
        self.after = {a: b for lane in lanes for a, b in itertools.pairwise(lane)}
        self.times = times
        self.needed_by: dict[Action, list[Action]] = {}
        for action, needed in needs.items():
            for other in needed:
                self.needed_by.setdefault(other, []).append(action)
        self.when = play(lanes, lambda action: [(other, 0.0) for other in needs[action]], times.of)

    @property
    def lanes(self) -> list[list[Action]]:
        """The actions of each lane, in order."""
        return [list(self._from(first)) for first in self.first]

    def _from(self, action: Action | None) -> Iterator[Action]:
        while action is not None:
            yield action
            action = self.after.get(action)

    def gap(self, action: Action, arrived: float, room: float) -> Action:
        """The action before the first gap, from ``action`` on, with ``room`` for one that arrives at ``arrived``."""
        for here in self._from(action):
            begin = max(arrived, self.when[here][1])
            following = self.after.get(here)
            if following is None or begin + room <= self.when[following][0] > begin:
                break
        return here

    def insert(self, action: Action, before: Action, arrived: float) -> None:
        """Put ``action`` after ``before``, and off what would overlap with it."""
        following = self.after.get(before)
        begin = max(arrived, self.when[before][1])
        self.when[action] = begin, begin + self.times.of(action)
        self.after[before] = action
        if following is not None:
            self.after[action] = following
            self._put_off(following, self.when[action][1])

    def _put_off(self, action: Action, start: float) -> None:
        """Start ``action`` at ``start`` if it would start earlier, and all that waits for it accordingly.

        In the order in which the late actions started so far, in which each comes after all that it waits for.
        """
        starts = {action: start} if start > self.when[action][0] else {}
        late = [(self.when[first][0], first) for first in starts]
        while late:
            _, action = heapq.heappop(late)
            start = starts.pop(action)
            end = start + self.times.of(action)
            self.when[action] = start, end
            for other in (self.after.get(action), *self.needed_by.get(action, ())):
                if other in self.when and self.when[other][0] < end:
                    if other not in starts:
                        heapq.heappush(late, (self.when[other][0], other))
                    starts[other] = max(end, starts.get(other, 0.0))


def period(table: ActionTable, times: ActionTimes) -> float:
    """The time from one step to the next once steps have settled, with free messages.

    A lane begins a step when it has ended the one before and every lane has its gradients of that one.
    """
    order = play(table.lanes, lambda action: [(other, 0.0) for other in table.needs[action]], times.of)
    number = {action: k for k, action in enumerate(order)}
    rows = [(table.lane_of[a.stage], [number[other] for other in table.needs[a]], times.of(a)) for a in order]
    last = [next(number[a] for a in reversed(lane) if a.kind in GRADIENTS_OF_WEIGHTS) for lane in table.lanes]
    clock, ends = [0.0] * len(table.lanes), []
    settled, more = 2, 2
    for _ in range(settled + more):
        end: list[float] = []
        for lane, needed, seconds in rows:
            clock[lane] = max([clock[lane], *[end[k] for k in needed]]) + seconds
            end.append(clock[lane])
        ends.append(max(clock))
        updated = max(end[k] for k in last)
        clock = [max(ended, updated) for ended in clock]
    return (ends[-1] - ends[settled - 1]) / more
