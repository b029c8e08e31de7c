"""The published schedules: the order of forward and backward on each lane, without any no-gradient pass.

p = 2 lanes, m = 3 micro-batches; lower case is the second chunk (virtual stages), I and W are the parts of B:

    gpipe             F0 F1 F2 B0 B1 B2                          1f1b    F0 F1 B0 F2 B1 B2
                      F0 F1 F2 B0 B1 B2                                  F0 B0 F1 B1 F2 B2
    looped_bfs        F0 F1 F2 f0 f1 f2 b0 b1 b2 B0 B1 B2        zb_h1   F0 F1 I0 W0 F2 I1 W1 I2 W2
                      F0 F1 F2 f0 f1 f2 b0 b1 b2 B0 B1 B2                F0 I0 F1 I1 W0 F2 I2 W1 W2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpdqn.schedule.actions import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action

Lanes = list[list[Action]]


def gpipe(p: int, m: int) -> Lanes:
    """Every forward, then every backward (Huang et al. 2019)."""
    return [[Action(j, kind, i) for kind in (FORWARD, BACKWARD) for i in range(m)] for j in range(p)]


def one_f_one_b(p: int, m: int) -> Lanes:
    """1F1B: at most p − j micro-batches in flight at stage j (PipeDream-flush, Narayanan et al. 2021, §2.2)."""
    lanes = []
    for j in range(p):
        forwards = [[Action(j, FORWARD, i)] for i in range(m)]
        backwards = [[Action(j, BACKWARD, i)] for i in range(m)]
        lanes.append(_alternate(forwards, backwards, warmup=p - 1 - j))
    return lanes


def interleaved_1f1b(p: int, m: int, v: int) -> Lanes:
    """1F1B over v chunks a lane, lane j holding stages j, j + p, … (Narayanan et al. 2021, §2.2).

    Micro-batches go through the chunks in groups of p. Where p does not divide m, unlike there, the groups are ⌊m/p⌋
    of as equal a size as can be, none smaller than p: a small last group would wait in a ring. One chunk is 1F1B.
    """
    if v == 1:
        return one_f_one_b(p, m)
    groups = microbatch_groups(p, m)
    lanes = []
    for j in range(p):
        forwards = [[Action(c * p + j, FORWARD, i)] for group in groups for c in range(v) for i in group]
        backwards = [[Action(c * p + j, BACKWARD, i)] for group in groups for c in reversed(range(v)) for i in group]
        lanes.append(_alternate(forwards, backwards, warmup=(v - 1) * len(groups[0]) + 2 * (p - 1 - j)))
    return lanes


def looped_bfs(p: int, m: int, v: int) -> Lanes:
    """Breadth first: each chunk runs all its micro-batches before the next (Lamy-Poirier 2023)."""
    return [
        [Action(c * p + j, FORWARD, i) for c in range(v) for i in range(m)]
        + [Action(c * p + j, BACKWARD, i) for c in reversed(range(v)) for i in range(m)]
        for j in range(p)
    ]


def zb_h1(p: int, m: int) -> Lanes:
    """ZB-H1: 1F1B with each W put off by j micro-batches on lane j, in the memory of 1F1B (Qi et al. 2024, §2.2)."""
    lanes = []
    for j in range(p):
        forwards = [[Action(j, FORWARD, i)] for i in range(m)]
        backwards = [
            [Action(j, BACKWARD_INPUT, i), *([Action(j, BACKWARD_WEIGHT, i - j)] if i >= j else [])] for i in range(m)
        ]
        rest = [Action(j, BACKWARD_WEIGHT, i) for i in range(max(0, m - j), m)]
        lanes.append(_alternate(forwards, backwards, warmup=p - 1 - j) + rest)
    return lanes


def zbv(p: int, m: int) -> Lanes:
    """ZB-V: two chunks a lane, lane j holding stages j and 2p − 1 − j (Qi et al. 2024, Pipeline Parallelism with
    Controllable Memory, §4).

    The pattern is written for m ≥ 2p − 1; of a smaller m the actions of micro-batches that are not there fall out.
    """  # fmt: skip
    full = max(2 * p - 1, m)
    return [[a for a in _zbv_lane(j, p, full) if a.microbatch < m] for j in range(p)]


def _zbv_lane(j: int, p: int, m: int) -> Iterator[Action]:
    """One lane of ZB-V: down the first chunk, up the second, one of each in turn, and the weights that are left."""
    down, up = j, 2 * p - 1 - j
    count = {(stage, kind): 0 for stage in (down, up) for kind in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)}

    def next_(stage: int, *kinds: str) -> Iterator[Action]:
        for kind in kinds:
            if count[stage, kind] < m:
                yield Action(stage, kind, count[stage, kind])
                count[stage, kind] += 1

    whole = (BACKWARD_INPUT, BACKWARD_WEIGHT)
    for _ in range(2 * (p - j) - 1):
        yield from next_(down, FORWARD)
    for _ in range(j):
        yield from next_(up, FORWARD)
        yield from next_(down, FORWARD)
    for _ in range(p - j):
        yield from next_(up, FORWARD, *whole)
    while count[up, FORWARD] < m:
        yield from next_(down, FORWARD, *whole)
        yield from next_(up, FORWARD, *whole)
    for _ in range(j):
        yield from next_(down, BACKWARD_INPUT)
        yield from next_(up, BACKWARD_INPUT)
    for _ in range(p - j):
        yield from next_(down, *whole)
    for stage in (up, down):
        while count[stage, BACKWARD_WEIGHT] < m:
            yield from next_(stage, BACKWARD_WEIGHT)


def microbatch_groups(p: int, m: int) -> list[range]:
    """The micro-batches in ⌊m/p⌋ groups, at least one, whose sizes differ by one at most, the larger ones first."""
    count = max(1, m // p)
    sizes = [m // count + (k < m % count) for k in range(count)]
    return [range(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(count)]


def _alternate(forwards: Sequence[list[Action]], backwards: Sequence[list[Action]], warmup: int) -> list[Action]:
    """``warmup`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    order = [action for step in forwards[:warmup] for action in step]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [*forward, *backward]
    return order + [action for step in backwards[len(forwards) - warmup :] for action in step]
