"""`simulate`: an action table, the times of its actions and the links between ranks, to a `Timeline`.

    table    0F0 0F1 0B0 0B1        rank 0  |F0|F1|....|B0--|B1--|U|
             1F0 1B0 1F1 1B1   ─▶   message    ╲  ╲   ╱     ╱
                                    rank 1  |..|F0|B0--|F1|B1--|...|U|        U: norm of all ranks, optimizer

It does what the runtime does. Every rank runs its actions in order, each when its inputs are there. A message leaves
when its action ends, nobody waits for the sending, and messages over one link follow one another. At the end of a step
a rank updates its weights once every rank has its gradients; target passes of the next batch need not wait for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpdqn.plan import Link
from mpdqn.schedule.actions import FORWARD, GRADIENTS_OF_INPUT, GRADIENTS_OF_WEIGHTS, RECOMPUTE, Action
from mpdqn.schedule.tables import ActionTable
from mpdqn.schedule.times import ActionTimes, play
from mpdqn.timeline import Span, Timeline

UPDATE = "optimizer"
MESSAGE = "message"


class _Item(NamedTuple):
    """An action, the message with its result (``message``), or a rank's update (no action)."""

    step: int
    action: Action | None
    message: bool = False
    rank: int = -1

    def __str__(self) -> str:
        return f"{'message of ' * self.message}{self.action or f'update of rank {self.rank}'} in step {self.step}"


def simulate(
    table: ActionTable,
    times: ActionTimes,
    *,
    owners: Sequence[int] | None = None,
    link: Link | None = None,
    message_bytes: Sequence[float] = (),
    steps: int = 1,
    update_s: float = 0.0,
) -> Timeline:
    """When every action of ``steps`` steps in a row starts and ends.

    Args:
        table: the step.
        times: seconds of each kind of action, by stage.
        owners: the rank that holds each stage; each lane is a rank of its own if not given.
        link: what carries messages between two ranks; free if not given.
        message_bytes: bytes of one micro-batch between stage j and j + 1, for each j; 0 if not given.
        steps: how many steps follow one another.
        update_s: seconds of the optimizer's step on each rank.

    Returns:
        spans of every action (and, where they take time, of the updates), by start; ``seconds`` is the last end.

    Raises:
        ValueError: if the ranks would wait for one another for ever, naming the actions.
    """
    owners = table.lane_of if owners is None else owners
    link = link or Link()
    ranks = sorted(set(owners))
    orders = {rank: table.rank_order(owners, rank) for rank in ranks}
    last_gradient = {
        rank: next((a for a in reversed(order) if a.kind in GRADIENTS_OF_WEIGHTS), None)
        for rank, order in orders.items()
    }
    sends = {a: to for a in table.actions if (to := _crosses(table, owners, a)) is not None}
    before = {order[k]: order[k - 1] for order in orders.values() for k in range(1, len(order))}
    channels: dict[tuple[int, int], list[Action]] = {}
    for rank, order in orders.items():
        for action in order:
            if action in sends:
                channels.setdefault((rank, owners[sends[action].stage]), []).append(action)
    if not link.posted_ahead:  # a message goes when it is asked for, whatever the sender has had ready for longer
        place = {action: k for order in orders.values() for k, action in enumerate(order)}
        for sent in channels.values():
            sent.sort(key=lambda action: place[sends[action]])

    def needs(item: _Item) -> Iterator[tuple[_Item, float]]:
        step, action, message, _ = item
        if action is None:
            yield from ((_Item(step, last), 0.0) for last in last_gradient.values() if last is not None)
        elif message:
            yield _Item(step, action), 0.0
            if not link.posted_ahead:
                receives = sends[action]
                if receives in before:
                    yield _Item(step, before[receives]), 0.0
                elif step:
                    yield _Item(step - 1, None, rank=owners[receives.stage]), 0.0
        else:
            for other in table.dependencies(action):
                crosses = other in sends and owners[other.stage] != owners[action.stage]
                yield _Item(step, other, crosses), link.latency_s if crosses else 0.0

    def seconds(item: _Item) -> float:
        if item.action is None:
            return update_s
        if not item.message:
            return times.of(item.action)
        edge = item.action.stage - (item.action.kind in GRADIENTS_OF_INPUT)
        return (message_bytes[edge] if message_bytes else 0.0) / link.bytes_per_s

    work = [
        [item for k in range(steps) for item in (*(_Item(k, a) for a in orders[rank]), _Item(k, None, rank=rank))]
        for rank in ranks
    ]
    post = [[_Item(k, a, True) for k in range(steps) for a in sent] for sent in channels.values()]
    when = play([*work, *post], needs, seconds)
    spans = [
        Span(
            rank,
            item.action.kind if item.action else UPDATE,
            *(item.action or (-1, "", -1))[::2],
            *when[item],
            item.step,
        )
        for rank, order in zip(ranks, work, strict=True)
        for item in order
        if item.action is not None or update_s > 0
    ]
    return Timeline(tuple(sorted(spans, key=lambda s: (s.start, s.rank))), max(end for _, end in when.values()))


def _crosses(table: ActionTable, owners: Sequence[int], action: Action) -> Action | None:
    """The action on another rank that takes the result of ``action``; None if it stays on its rank."""
    to = table.result_goes_to(action)
    return to if to is not None and owners[to.stage] != owners[action.stage] else None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Steps one after the other, once they have settled.

    ``step_s`` is the time from one step to the next; ``utilisation`` the share of it in which each rank works, by rank.
    """

    step_s: float
    utilisation: Mapping[int, float]

    @property
    def mean_utilisation(self) -> float:
        """The mean over the ranks."""
        return sum(self.utilisation.values()) / len(self.utilisation)


def pace(
    table: ActionTable,
    times: ActionTimes,
    *,
    owners: Sequence[int] | None = None,
    link: Link | None = None,
    message_bytes: Sequence[float] = (),
    update_s: float = 0.0,
) -> Pace:
    """How fast steps follow one another, and how busy that keeps the ranks; arguments as in `simulate`."""
    settled, more = 2, 2
    timeline = simulate(
        table,
        times,
        owners=owners,
        link=link,
        message_bytes=message_bytes,
        steps=settled + more,
        update_s=update_s,
    )
    ends = [max(s.end for s in timeline.spans if s.step == k) for k in range(settled + more)]
    step_s = (ends[-1] - ends[settled - 1]) / more
    ranks = sorted({span.rank for span in timeline.spans})
    work = {r: sum(s.seconds for s in timeline.spans if s.rank == r and s.step == 0) for r in ranks}
    return Pace(step_s=step_s, utilisation={r: work[r] / step_s if step_s else 1.0 for r in ranks})


def peak_activations(order: Sequence[Action], kept: Sequence[float], rebuilt: Sequence[float]) -> float:
    """The most that one rank keeps for its backwards at any moment, in the unit of ``kept``.

    Args:
        order: the actions of the rank.
        kept: by stage, what a forward leaves until its backward: its graph, or its input where it is run again.
        rebuilt: by stage, what running it again adds: from R to the end of the backward, or during each part of the
            backward where the table has no R, which then builds the stage again itself, layer by layer.
    """
    now = most = 0.0
    again = {(a.stage, a.microbatch) for a in order if a.kind == RECOMPUTE}
    for stage, kind, i in order:
        if kind == FORWARD:
            now += kept[stage]
        elif kind == RECOMPUTE:
            now += rebuilt[stage]
        elif kind in (*GRADIENTS_OF_INPUT, *GRADIENTS_OF_WEIGHTS) and (stage, i) not in again:
            most = max(most, now + rebuilt[stage])
        if kind in GRADIENTS_OF_WEIGHTS:
            now -= kept[stage] + (rebuilt[stage] if (stage, i) in again else 0.0)
        most = max(most, now)
    return most
