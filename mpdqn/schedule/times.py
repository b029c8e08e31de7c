"""`ActionTimes`, and `play`: when each action of some orders starts and ends."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from mpdqn.schedule.actions import BACKWARD, Action

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class ActionTimes:
    """Seconds of each kind of action on one micro-batch, by stage: ``seconds["F"][j]``."""

    seconds: Mapping[str, tuple[float, ...]]

    @classmethod
    def units(cls, num_stages: int, **kinds: float) -> Self:
        """Equal stages: every kind takes 1, a whole backward 2, unless ``kinds`` say otherwise (``B=3.0``)."""
        unit = dict.fromkeys("FRIWTD", 1.0) | {BACKWARD: 2.0} | kinds
        return cls(seconds={kind: (float(time),) * num_stages for kind, time in unit.items()})

    def of(self, action: Action) -> float:
        """Seconds of ``action``; KeyError for a kind without times."""
        return self.seconds[action.kind][action.stage]


def play(
    orders: Sequence[Sequence[K]],
    needs: Callable[[K], Iterable[tuple[K, float]]],
    seconds: Callable[[K], float],
) -> dict[K, tuple[float, float]]:
    """Start and end of every item, where each order runs its items one by one, each as early as it can.

    Args:
        orders: what each worker does, in order.
        needs: what must have ended before an item can start, and how long before.
        seconds: how long an item takes.

    Raises:
        ValueError: if the orders wait for one another in a ring; it names the first items that wait, and for what.
    """
    times: dict[K, tuple[float, float]] = {}
    position, clock = [0] * len(orders), [0.0] * len(orders)
    blocked_on: dict[K, list[int]] = {}
    ready = list(range(len(orders)))[::-1]
    while ready:
        worker = ready.pop()
        order = orders[worker]
        while position[worker] < len(order):
            item = order[position[worker]]
            start = clock[worker]
            for other, delay in needs(item):
                if other not in times:
                    blocked_on.setdefault(other, []).append(worker)
                    break
                start = max(start, times[other][1] + delay)
            else:
                clock[worker] = start + seconds(item)
                times[item] = start, clock[worker]
                position[worker] += 1
                ready += blocked_on.pop(item, ())
                continue
            break
    if any(position[worker] < len(order) for worker, order in enumerate(orders)):
        waiting = "; ".join(
            f"{orders[w][position[w]]} waits for {other}"
            for other, workers in list(blocked_on.items())[:4]
            for w in workers
        )
        raise ValueError(f"deadlock: {waiting}")
    return times
