"""`best_table`: the order of a step, searched with the real times of its actions.

Textbook orders are made for equal stages. `tdzb` may take any order: F as early as its memory allows, the input's
backward I before all else since the stage before waits for it, the weights' W where nothing else can be done, and the
target passes T of the next batch where still nothing can.

    ready:  I ─▶ F, while fewer micro-batches than the cap are in flight ─▶ W ─▶ wait      (T goes in at the end)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from mpdqn.schedule import ActionTable, ActionTimes, action_table
from mpdqn.schedule.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    GRADIENTS_OF_INPUT,
    GRADIENTS_OF_WEIGHTS,
    RECOMPUTE,
    Action,
)
from mpdqn.schedule.fillers import CLOSE, best_fill, period
from mpdqn.schedule.times import play

SEARCHED = "tdzb"
"""The schedule whose order is searched."""

TEXTBOOK = ("zb_h1", "1f1b")
"""The schedules whose orders compete with the greedy ones: ZB-H1's and 1F1B's."""


def best_table(
    schedule: str,
    num_lanes: int,
    num_microbatches: int,
    passes: str,
    *,
    ahead: str,
    times: ActionTimes,
    virtual: int | None = None,
    recompute: Collection[int] = (),
    memory_factor: float = 1.0,
) -> ActionTable:
    """The table of ``schedule`` whose steps follow one another fastest with these times and free messages.

    All schedules but `tdzb` have one order and only their fillers depend on ``times``: theirs is `action_table`'s. For
    `tdzb` it is the fastest of ZB-H1, 1F1B and greedy orders, each filled. No lane of those has more than
    ⌊p·memory_factor⌋ micro-batches between F and the end of their backward: with the default at most as many as
    1F1B has on its first lane (on later lanes, where 1F1B has p − j, up to p). A larger factor buys speed with memory;
    `peak_activations` says how much. Steps within 0.1 % of the work of the busiest lane end the search.

    Args:
        schedule, num_lanes, num_microbatches, passes, ahead, virtual, recompute: as in `action_table`.
        times: seconds of each kind of action, by stage.
        memory_factor: at least 1.

    Raises:
        ValueError: as `action_table`, and for a factor below 1, in which ZB-H1 and 1F1B do not fit.
    """
    if memory_factor < 1:
        raise ValueError(f"memory_factor is {memory_factor} but 1F1B itself needs 1; recompute to save memory")
    sizes = num_lanes, num_microbatches
    if schedule != SEARCHED:
        return action_table(schedule, *sizes, passes, ahead=ahead, virtual=virtual, recompute=recompute, times=times)
    early = "".join(letter for letter in passes if letter in ahead)
    now = "".join(letter for letter in passes if letter not in ahead)
    textbook = [action_table(name, *sizes, now, virtual=virtual, recompute=recompute) for name in TEXTBOOK]
    orders = [*textbook, *_greedy_tables(textbook[0], recompute, memory_factor, times)]
    # What the busiest lane works, with the cheaper backward: no step is shorter. A pass ahead is as long as ever.
    ahead_s = [num_microbatches * sum(times.seconds[letter][j] for letter in early) for j in range(num_lanes)]
    least = max(min(sum(map(times.of, table.lanes[j])) for table in orders) + ahead_s[j] for j in range(num_lanes))
    best, fastest = textbook[0], math.inf
    for unfilled_s, order in sorted(((period(order, times), order) for order in orders), key=lambda pair: pair[0]):
        if unfilled_s >= fastest:
            break  # fillers make no order faster
        table = best_fill(order, early, times) if early else order
        step = period(table, times)
        if step < fastest:
            best, fastest = table, step
        if step <= CLOSE * least:
            break
    return replace(best, schedule=SEARCHED)


def _greedy_tables(
    like: ActionTable, recompute: Collection[int], memory_factor: float, times: ActionTimes
) -> list[ActionTable]:
    """Greedy orders of the step ``like``, by how many micro-batches each lane may have in flight."""
    p, m = len(like.lanes), like.num_microbatches
    in_front = [[a for a in lane if a.kind in like.passes] for lane in like.lanes]
    most = min(m, int(p * memory_factor))
    caps = [[p - j for j in range(p)], *([c] * p for c in sorted({min(c, most) for c in (p, 2 * p - 1, m)}))]
    return [
        ActionTable(SEARCHED, _greedy(in_front, m, cap, whole, recompute, times), like.passes)
        for cap, whole in itertools.product(caps, _whole_backwards(p, recompute, times))
    ]


def _whole_backwards(p: int, recompute: Collection[int], times: ActionTimes) -> list[set[int]]:
    """Which stages do not split their backward.

    The first has nobody to hurry for, and what is built again (R) should not wait in memory for its W. Where the two
    parts cost more than the whole, both ways are tried.
    """
    seconds = times.seconds
    always = {0, *recompute}
    dear = {
        j for j in range(p) if seconds[BACKWARD_INPUT][j] + seconds[BACKWARD_WEIGHT][j] > CLOSE * seconds[BACKWARD][j]
    }
    return [always] if dear <= always else [always, always | dear]


def _greedy(
    in_front: Sequence[Sequence[Action]],
    m: int,
    caps: Sequence[int],
    whole: Collection[int],
    recompute: Collection[int],
    times: ActionTimes,
) -> tuple[tuple[Action, ...], ...]:
    """What each lane of one stage does if, whenever it is free, it takes the most urgent action that is ready.

    Args:
        in_front: the no-gradient passes that each lane runs first.
        m: micro-batches.
        caps: by lane, how many of them may be between F and the end of their backward.
        whole: the stages whose backward is not split.
        recompute: the stages that run their forward again before it.
        times: seconds of each kind of action.
    """
    p = len(in_front)
    lanes = [list(lane) for lane in in_front]
    played = play(lanes, lambda a: [(a._replace(stage=a.stage - 1), 0.0)] if a.stage else [], times.of)
    ends = {action: end for action, (_, end) in played.items()}
    clock = [ends[lane[-1]] if lane else 0.0 for lane in lanes]
    backward = [BACKWARD if j in whole else BACKWARD_INPUT for j in range(p)]
    forwards, backwards, finished = [0] * p, [0] * p, [0] * p

    def choose(j: int, now: float) -> str:
        """The kind of what lane j does now; empty if it has to wait."""
        i, back = forwards[j], backwards[j]
        forward = (
            i < m and i - finished[j] < caps[j] and (j == 0 or ends.get(Action(j - 1, FORWARD, i), math.inf) <= now)
        )
        gradient = back < i and (j == p - 1 or ends.get(Action(j + 1, backward[j + 1], back), math.inf) <= now)
        if gradient and not (j == 0 and forward):
            return backward[j]
        if forward:
            return FORWARD
        return BACKWARD_WEIGHT if finished[j] < back else ""

    moments = sorted(clock)
    while moments:
        now = heapq.heappop(moments)
        for j in range(p):
            if clock[j] > now or not (kind := choose(j, now)):
                continue
            i = {FORWARD: forwards, BACKWARD_WEIGHT: finished}.get(kind, backwards)[j]
            again = [Action(j, RECOMPUTE, i)] if j in recompute and kind in GRADIENTS_OF_INPUT else []
            clock[j] = now
            for action in (*again, Action(j, kind, i)):
                clock[j] += times.of(action)
                ends[action] = clock[j]
                lanes[j].append(action)
            forwards[j] += kind == FORWARD
            backwards[j] += kind in GRADIENTS_OF_INPUT
            finished[j] += kind in GRADIENTS_OF_WEIGHTS
            heapq.heappush(moments, clock[j])
    return tuple(map(tuple, lanes))
