"""Action tables: ``(schedule, p, m, passes) -> the actions of every stage, in order``.

One Double DQN step with p = 2 stages and m = 2 micro-batches, time to the right (· waits):

    gpipe   stage 0  T0 T1 D0 D1 F0 F1  ·  ·  · B0 B0 B1 B1
            stage 1   · T0 T1 D0 D1 F0 F1 B0 B0 B1 B1  ·  ·

The agent's no-gradient passes run first, one after the other, without a drain between them; forward and backward
follow in the order of the schedule.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence, Set

from mpdqn.schedule.actions import BACKWARD, FORWARD, Action, dependencies

SCHEDULES = ("gpipe", "1f1b")

Table = tuple[tuple[Action, ...], ...]


def action_table(schedule: str, num_stages: int, num_microbatches: int, passes: str = "") -> Table:
    """The actions of each stage of one step, in order.

    Args:
        schedule: ``gpipe`` (Huang et al. 2019: every forward, then every backward) or ``1f1b`` (PipeDream-flush,
            Narayanan et al. 2021: at most p − j micro-batches in flight at stage j).
        num_stages: p ≥ 1.
        num_microbatches: m ≥ 1, also below p.
        passes: the letters of the agent's no-gradient passes, in the order in which they run.

    Raises:
        ValueError: for an unknown schedule, with the nearest known one.
    """
    if schedule not in SCHEDULES:
        nearest = difflib.get_close_matches(schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown schedule {schedule!r}; did you mean {nearest!r}? Known: {', '.join(SCHEDULES)}")
    m = num_microbatches
    table = []
    for stage in range(num_stages):
        warmup = m if schedule == "gpipe" else min(m, num_stages - 1 - stage)
        order = [(letter, i) for letter in passes for i in range(m)]
        order += [(FORWARD, i) for i in range(warmup)]
        for i in range(warmup, m):
            order += [(FORWARD, i), (BACKWARD, i - warmup)]
        order += [(BACKWARD, i) for i in range(m - warmup, m)]
        table.append(tuple(Action(stage, kind, i) for kind, i in order))
    return tuple(table)


def rank_order(table: Table, owners: Sequence[int], rank: int, passes: str = "") -> tuple[Action, ...]:
    """The order in which ``rank`` runs the actions of all stages it holds.

    The whole table is played tick by tick, one action per rank and tick. Each stage keeps its own order; of several
    stages on one rank the last that is ready goes first, so that a micro-batch is carried on as far as it can be.
    Every rank plays the same table, so the orders of the ranks fit together and cannot wait for one another in a ring.

    Args:
        table: the actions of each stage.
        owners: the rank that holds each stage.
        rank: whose order is asked.
        passes: the letters of the agent's no-gradient passes.

    Raises:
        ValueError: if the table cannot run, naming the first impossible action.
    """
    position = [0] * len(table)
    done: set[Action] = set()
    order: list[Action] = []
    while any(position[stage] < len(actions) for stage, actions in enumerate(table)):
        tick: dict[int, Action] = {}
        for stage, actions in enumerate(table):
            if position[stage] == len(actions):
                continue
            action = actions[position[stage]]
            if all(needed in done for needed in dependencies(action, len(table), passes)):
                tick[owners[stage]] = action  # a later stage replaces an earlier one of the same rank
        if not tick:
            stuck, missing = _impossible(table, position, done, passes)
            raise ValueError(f"the table cannot run: {stuck} waits for {missing}, which cannot come before it")
        for owner, action in tick.items():
            position[action.stage] += 1
            done.add(action)
            if owner == rank:
                order.append(action)
    return tuple(order)


def _impossible(table: Table, position: Sequence[int], done: Set[Action], passes: str) -> tuple[Action, Action]:
    """Where nothing can go on: the first action that waits in vain, and for what.

    A stage is at fault that waits for a later action of its own, or for one that is in no stage's list; the others may
    only be waiting for it.
    """
    waiting = [
        (action, needed)
        for stage, actions in enumerate(table)
        for action in actions[position[stage] : position[stage] + 1]
        for needed in dependencies(action, len(table), passes)
        if needed not in done
    ]
    known = set().union(*table)
    return next((pair for pair in waiting if pair[0].stage == pair[1].stage or pair[1] not in known), waiting[0])


def bubble_fraction(num_stages: int, num_microbatches: int, forward: float, backward: float, num_passes: int) -> float:
    """The share of a step in which each rank waits, for p equal stages and free messages (GPipe and 1F1B alike).

    With forward time F and backward time B of one micro-batch and k no-gradient passes, a rank works
    m·((k + 1)·F + B) and waits (p − 1)·(F + B): the passes follow one another without a drain, so that only the
    last ramp up and down is lost (Huang et al. 2019, §2.3, gives (p − 1)/(m + p − 1) for k = 0).
    """
    work = num_microbatches * ((num_passes + 1) * forward + backward)
    wait = (num_stages - 1) * (forward + backward)
    return wait / (work + wait) if work + wait > 0 else 0.0
