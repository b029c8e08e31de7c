"""`action_table`: from the name of a schedule and its sizes to the table of one step.

published order of F and B ─▶ + no-gradient passes in front ─▶ + recomputation ─▶ + target passes of the next batch
(textbook.py)                 one after the other, no drain     R before B         in the gaps (fillers.py)
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mpdqn.schedule import textbook
from mpdqn.schedule.actions import GRADIENTS_OF_INPUT, RECOMPUTE, Action
from mpdqn.schedule.fillers import best_fill
from mpdqn.schedule.tables import ActionTable
from mpdqn.schedule.times import ActionTimes


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A way to order a step.

    ``virtual`` is the usual number of stages on a lane, and the only one where ``any_virtual`` is False; ``filled``
    schedules put target passes of the next batch into their gaps.
    """

    lanes: Callable[[int, int, int], textbook.Lanes]
    virtual: int = 1
    any_virtual: bool = False
    v_shaped: bool = False
    filled: bool = False


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(lanes=lambda p, m, v: textbook.gpipe(p, m)),
    "1f1b": Schedule(lanes=lambda p, m, v: textbook.one_f_one_b(p, m)),
    "interleaved_1f1b": Schedule(lanes=textbook.interleaved_1f1b, virtual=2, any_virtual=True),
    "looped_bfs": Schedule(lanes=textbook.looped_bfs, virtual=2, any_virtual=True),
    "zb_h1": Schedule(lanes=lambda p, m, v: textbook.zb_h1(p, m)),
    "zbv": Schedule(lanes=lambda p, m, v: textbook.zbv(p, m), virtual=2, v_shaped=True),
    "td1f1b": Schedule(lanes=lambda p, m, v: textbook.one_f_one_b(p, m), filled=True),
    "tdzb": Schedule(lanes=lambda p, m, v: textbook.zb_h1(p, m), filled=True),
}
"""The schedules by name: textbook ones first, then Q-learning's own."""


def find_schedule(name: str) -> Schedule:
    """The schedule called ``name``; ValueError for an unknown one, with the nearest known name."""
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown schedule {name!r}; did you mean {nearest!r}? Known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def check_virtual(name: str, virtual: int) -> None:
    """Raise ValueError unless schedule ``name`` can have ``virtual`` stages on a rank."""
    schedule = find_schedule(name)
    if virtual < 1 or (virtual != schedule.virtual and not schedule.any_virtual):
        wanted = "at least 1" if schedule.any_virtual else f"exactly {schedule.virtual}"
        raise ValueError(f"{name} has {wanted} stages on each rank, not {virtual}; choose that or another schedule")


def lane_of_stages(name: str, num_lanes: int, virtual: int) -> tuple[int, ...]:
    """The lane of each of the num_lanes·virtual stages: in turn, or (``zbv``) down and up again."""
    check_virtual(name, virtual)
    p = num_lanes
    if find_schedule(name).v_shaped:
        return tuple(j if j < p else 2 * p - 1 - j for j in range(2 * p))
    return tuple(stage % p for stage in range(p * virtual))


def action_table(
    schedule: str,
    num_lanes: int,
    num_microbatches: int,
    passes: str = "",
    *,
    ahead: str = "",
    virtual: int | None = None,
    recompute: Collection[int] = (),
    times: ActionTimes | None = None,
) -> ActionTable:
    """The actions of each lane of one step, in order.

    Args:
        schedule: a name in `SCHEDULES`.
        num_lanes: p ≥ 1, the ranks of the pipeline.
        num_microbatches: m ≥ 1, also below p.
        passes: the letters of the agent's no-gradient passes, in the order in which they run.
        ahead: those of them that may run one batch early, as passes through a frozen target network may
            (``lookahead``). Only the schedules that fill their gaps make use of it.
        virtual: v, the stages on each lane; None takes the schedule's usual number.
        recompute: the stages that keep no graph and run each forward again just before its backward.
        times: how long the actions take, for the order of fillers; None is 2 for B and 1 for all others.

    Raises:
        ValueError: for an unknown schedule, with the nearest known one, or sizes that it cannot have.
    """
    kind = find_schedule(schedule)
    virtual = kind.virtual if virtual is None else virtual
    check_virtual(schedule, virtual)
    for what, count in (("num_lanes", num_lanes), ("num_microbatches", num_microbatches)):
        if count < 1:
            raise ValueError(f"{what} is {count} but must be at least 1")
    p, m = num_lanes, num_microbatches
    early = "".join(letter for letter in passes if letter in ahead) if kind.filled else ""
    now = "".join(letter for letter in passes if letter not in early)
    lane_of = lane_of_stages(schedule, p, virtual)
    lanes = []
    for lane, trained in enumerate(kind.lanes(p, m, virtual)):
        stages = [stage for stage, owner in enumerate(lane_of) if owner == lane]
        in_front = _in_front_of_v if kind.v_shaped else _in_front
        lanes.append(tuple(in_front(_with_recomputation(trained, recompute), now, stages, p, m)))
    table = ActionTable(schedule, tuple(lanes), now)
    if not early:
        return table
    return best_fill(table, early, times or ActionTimes.units(p * virtual, **dict.fromkeys(passes, 1.0)))


def _in_front(trained: list[Action], letters: str, stages: Sequence[int], p: int, m: int) -> list[Action]:
    """A lane with its no-gradient passes: a group of micro-batches through all its chunks, then the next group."""
    groups = textbook.microbatch_groups(p, m)
    return [
        Action(stage, letter, i) for letter in letters for group in groups for stage in stages for i in group
    ] + trained


def _in_front_of_v(trained: list[Action], letters: str, stages: Sequence[int], p: int, m: int) -> list[Action]:
    """A lane with its no-gradient passes where the last chunk is on the lane of the first: p = 2, m = 2, lane 0

        T0 T1 D0 t0 D1 t1 F0 d0 F1 d1        lower case is the second chunk, three micro-batches after the first:
                                             the way down and up again, as ZB-V's own forwards go

    The last micro-batches on their way up meet the first forwards, so that the lane does not drain between the two.
    """
    down, up = stages
    forwards = [*itertools.takewhile(lambda action: action.stage == down, trained)][: 2 * (p - down) - 1]
    downs = [Action(down, letter, i) for letter in letters for i in range(m)] + forwards
    ups = [Action(up, letter, i) for letter in letters for i in range(m)]
    late = 2 * (p - down) - 1
    both = [action for pair in itertools.zip_longest(ups, downs[late:]) for action in pair if action is not None]
    return [*downs[:late], *both, *trained[len(forwards) :]]


def _with_recomputation(actions: Sequence[Action], stages: Collection[int]) -> list[Action]:
    """The actions, with a forward that is run again before each backward of ``stages``.

    The graph is built again before the gradient is waited for, so that the two may overlap (torchgpipe does the same).
    """
    result = []
    for action in actions:
        if action.stage in stages and action.kind in GRADIENTS_OF_INPUT:
            result.append(action._replace(kind=RECOMPUTE))
        result.append(action)
    return result
