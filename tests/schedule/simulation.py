"""Two small machines that run action tables: one by time, one that only asks whether the ranks can ever end."""

from collections.abc import Mapping, Sequence

from mpdqn.schedule.actions import Action, dependencies
from mpdqn.schedule.tables import Table


def end_times(table: Table, passes: str, seconds: Mapping[str, float]) -> dict[Action, float]:
    """When each action ends: one rank per stage, in the stage's order, free messages of any number."""
    ends: dict[Action, float] = {}
    position, clock = [0] * len(table), [0.0] * len(table)
    while any(position[stage] < len(actions) for stage, actions in enumerate(table)):
        moved = False
        for stage, actions in enumerate(table):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                needed = dependencies(action, len(table), passes)
                if not all(other in ends for other in needed):
                    break
                start = max([clock[stage], *(ends[other] for other in needed)])
                ends[action] = clock[stage] = start + seconds[action.kind]
                position[stage] += 1
                moved = True
        assert moved, "deadlock"
    return ends


def blocked(orders: Mapping[int, Sequence[Action]], num_stages: int, passes: str) -> dict[int, Action]:
    """Run the ranks' orders against each other, sends never waiting: the action in which each rank stays blocked."""
    done: set[Action] = set()
    position = dict.fromkeys(orders, 0)
    moved = True
    while moved:
        moved = False
        for rank, order in orders.items():
            while position[rank] < len(order):
                action = order[position[rank]]
                if not done.issuperset(dependencies(action, num_stages, passes)):
                    break
                done.add(action)
                position[rank] += 1
                moved = True
    return {rank: order[position[rank]] for rank, order in orders.items() if position[rank] < len(order)}
