"""Where to cut: the contiguous partition of a chain of layers whose slowest stage is as fast as possible.

    costs       3   1   4 | 1   5 | 9        p = 3: stages of 8, 6 and 9; the bottleneck is 9
    boundaries  0           3       5   6

The linear partition problem, solved exactly by dynamic programming over prefixes in at most n²·p steps (Skiena, The
Algorithm Design Manual, §10.7; torchgpipe solves the same problem by a heuristic, `balance/blockpartition.py`). A float
is a ratio of integers, so costs are brought to one denominator and compared as integers: no rounding decides. No torch
is imported here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mpdqn.plan import Partition, Profile


def balance(profile: Profile, num_stages: int, *, forward_passes: int = 1) -> Partition:
    """The partition of the profiled network into ``num_stages`` stages with the fastest slowest stage.

    A layer costs ``forward_passes`` forwards and one backward, in ms: a DQN step also runs the target network
    (``forward_passes=2``), Double DQN the online network on the next observation too (3). Among the partitions with
    the same bottleneck, the one with the fewest bytes across its cuts is taken. Every stage gets a layer that has
    parameters, since one without has nothing to train (unless no layer has any).

    Raises:
        ValueError: for more stages than layers with parameters, ``forward_passes`` below 1, or a negative or non-finite
            time.
    """
    if forward_passes < 1:
        raise ValueError(f"forward_passes is {forward_passes} but a step runs at least 1 forward pass")
    costs = [forward_passes * layer.forward_ms + layer.backward_ms for layer in profile.layers]
    cut_costs = [layer.boundary_bytes for layer in profile.layers]
    trained = [layer.parameter_bytes > 0 for layer in profile.layers]
    required = trained if any(trained) else None
    return Partition(boundaries=balance_costs(costs, num_stages, cut_costs=cut_costs, required=required))


def balance_costs(
    costs: Sequence[float],
    num_stages: int,
    *,
    cut_costs: Sequence[float] | None = None,
    required: Sequence[bool] | None = None,
) -> tuple[int, ...]:
    """The boundaries 0 … n of the best partition of a chain of n layers into exactly ``num_stages`` non-empty stages.

    Best is, in this order: the smallest cost of the costliest stage; the smallest sum of ``cut_costs`` over the cuts,
    where ``cut_costs[i]`` is what a cut after layer i costs (nothing if not given); the lexicographically smallest
    boundaries. All three are exact, also for float costs. If ``required`` is given, every stage must hold at least one
    layer i with ``required[i]``.

    Raises:
        ValueError: for more stages than layers (that are required), or a cost that is negative or not finite.
    """
    n = len(costs)
    if num_stages < 1:
        raise ValueError(f"num_stages is {num_stages} but must be at least 1")
    if num_stages > n:
        raise ValueError(
            f"{num_stages} stages need {num_stages} layers but the chain has {n}; ask for at most {n} stages or "
            "write the network in smaller layers"
        )
    for what, given in (("cut costs", cut_costs), ("required flags", required)):
        if given is not None and len(given) != n:
            raise ValueError(f"there are {len(given)} {what} for {n} layers; give one per layer, the last included")
    held = [0, *itertools.accumulate([1] * n if required is None else map(int, required))]
    if num_stages > held[n]:
        raise ValueError(
            f"{num_stages} stages need {num_stages} layers with parameters but the chain has {held[n]}; ask for at "
            f"most {held[n]} stages or write the network in smaller layers"
        )
    prefix = [0, *itertools.accumulate(_integers(costs, "cost"))]
    cuts = [0] * n if cut_costs is None else _integers(cut_costs, "cut cost")
    return _least_traffic(prefix, held, cuts, num_stages, limit=_bottleneck(prefix, held, num_stages))


def _integers(costs: Sequence[float], what: str) -> list[int]:
    """The costs over their common denominator, which scales them all alike and so changes no comparison."""
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(
                f"the {what} of layer {index} is {cost} but must be finite and not negative; profile again"
            )
    ratios = [cost.as_integer_ratio() for cost in costs]
    scale = math.lcm(*(denominator for _, denominator in ratios))
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _bottleneck(prefix: Sequence[int], held: Sequence[int], num_stages: int) -> int:
    """The smallest possible cost of the costliest stage.

    ``prefix[i]`` is the cost of the first i layers, ``held[i]`` how many of them are such that a stage must hold one.
    """
    n = len(prefix) - 1
    impossible = prefix[n] + 1
    # best[i]: the bottleneck of the first i layers in the stages so far, here one stage
    best = [prefix[i] if held[i] else impossible for i in range(n + 1)]
    for stages in range(2, num_stages + 1):
        # Downwards, so that best[cut < i] still speaks of one stage fewer.
        for i in range(n, stages - 1, -1):
            bottleneck = impossible
            for cut in range(i - 1, stages - 2, -1):
                last = prefix[i] - prefix[cut]
                if last >= bottleneck:  # the last stage only grows from here on
                    break
                if held[i] > held[cut]:
                    bottleneck = min(bottleneck, max(best[cut], last))
            best[i] = bottleneck
    return best[n]


def _least_traffic(
    prefix: Sequence[int], held: Sequence[int], cuts: Sequence[int], num_stages: int, limit: int
) -> tuple[int, ...]:
    """The boundaries with the least traffic whose stages all cost at most ``limit``, the smallest such boundaries."""
    n = len(prefix) - 1

    def fits(start: int, end: int) -> bool:
        return prefix[end] - prefix[start] <= limit and held[end] > held[start]

    # traffic[i]: the least traffic of the layers from i on in the stages so far; None where no stages fit.
    traffic: list[int | None] = [0 if fits(i, n) else None for i in range(n + 1)]
    ends: list[list[int]] = []  # ends[k][i]: where the first of k + 2 stages that start at layer i ends
    for _ in range(num_stages - 1):
        longer: list[int | None] = [None] * (n + 1)
        end_of = [n] * (n + 1)
        for i in range(n):
            for end in range(i + 1, n):
                if prefix[end] - prefix[i] > limit:
                    break
                rest = traffic[end]
                best = longer[i]
                if fits(i, end) and rest is not None and (best is None or cuts[end - 1] + rest < best):
                    longer[i], end_of[i] = cuts[end - 1] + rest, end
        traffic = longer
        ends.append(end_of)
    boundaries = [0]
    for end_of in reversed(ends):
        boundaries.append(end_of[boundaries[-1]])
    return (*boundaries, n)
