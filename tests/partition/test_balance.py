"""The solver against brute force over every partition, and what it refuses."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import pytest

from mpdqn.partition import balance, balance_costs
from mpdqn.plan import LayerCost, Partition, Profile

KINDS: dict[str, Callable[[random.Random], float]] = {
    "small integers, many ties": lambda rng: rng.randrange(4),
    "equal": lambda rng: 7,
    "all zero": lambda rng: 0.0,
    "tenths, which floats round": lambda rng: rng.randrange(12) * 0.1,
    "floats": lambda rng: rng.random(),
    "floats of all sizes, with zeros": lambda rng: rng.choice([0.0, 10.0 ** rng.uniform(-12, 12)]),
    "large integers": lambda rng: rng.randrange(2**53, 2**60),
}


def exact(costs: Sequence[float]) -> list[int]:
    """Every float is an integer after multiplication with 2**1074, the inverse of the smallest one."""
    return [int(Fraction(cost) * 2**1074) for cost in costs]


def brute_force(
    costs: Sequence[float], num_stages: int, cut_costs: Sequence[float], required: Sequence[bool]
) -> tuple[int, ...]:
    prefix, traffic, n = [0, *itertools.accumulate(exact(costs))], exact(cut_costs), len(costs)
    keys = []
    for cuts in itertools.combinations(range(1, n), num_stages - 1):
        if not all(any(required[a:b]) for a, b in itertools.pairwise((0, *cuts, n))):
            continue
        bottleneck = max(prefix[b] - prefix[a] for a, b in itertools.pairwise((0, *cuts, n)))
        keys.append((bottleneck, sum(traffic[cut - 1] for cut in cuts), (0, *cuts, n)))
    return min(keys)[-1]


@pytest.mark.parametrize("part", range(4))
def test_equals_brute_force(part: int) -> None:
    rng = random.Random(part)
    for chain in range(500):
        draw = KINDS[rng.choice(list(KINDS))]
        n = rng.randint(1, 12)
        costs = [draw(rng) for _ in range(n)]
        cut_costs = [rng.randrange(5) for _ in range(n)] if chain % 2 else None
        for num_stages in range(1, n + 1):
            expected = brute_force(costs, num_stages, cut_costs or [0] * n, [True] * n)
            assert balance_costs(costs, num_stages, cut_costs=cut_costs) == expected, (costs, cut_costs)
        required = [rng.random() < 0.6 for _ in range(n)]
        for num_stages in range(1, sum(required) + 1):
            expected = brute_force(costs, num_stages, cut_costs or [0] * n, required)
            found = balance_costs(costs, num_stages, cut_costs=cut_costs, required=required)
            assert found == expected, (costs, cut_costs, required)


def test_every_stage_gets_a_layer_with_parameters() -> None:
    """Without that, the least traffic made stages of a ReLU or a Flatten alone, which have nothing to train."""
    chain = profile_of((5, 0, 0, 9), (9, 0, 0, 1), (5, 0, 0, 9))
    layers = [replace(layer, parameter_bytes=size) for layer, size in zip(chain.layers, (8, 0, 8), strict=True)]
    assert balance(replace(chain, layers=tuple(layers)), 2).boundaries == (0, 2, 3)
    message = "3 stages need 3 layers with parameters but the chain has 2; ask for at most 2 stages"
    with pytest.raises(ValueError, match=message):
        balance(replace(chain, layers=tuple(layers)), 3)


def test_the_drawing_in_the_module() -> None:
    assert balance_costs([3, 1, 4, 1, 5, 9], 3) == (0, 3, 5, 6)


def test_rounding_does_not_decide() -> None:
    # Beside 2**53 a float loses 1: both cuts before the third layer would seem to cost 2**53, and the first would win.
    assert balance_costs([1.0, 1.0, 2.0**53, 1.0], 2) == (0, 2, 4)


def test_a_long_chain_is_solved() -> None:
    rng = random.Random(0)
    costs = [rng.random() for _ in range(400)]
    boundaries = balance_costs(costs, 8)
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(boundaries)) < sum(costs) / 8 + 1


def profile_of(*layers: tuple[float, float, float, int]) -> Profile:
    """A profile with (forward, backward-input, backward-weight, boundary bytes) per layer."""
    costs = tuple(
        LayerCost(
            name=str(i),
            forward_ms=forward,
            backward_input_ms=backward_input,
            backward_weight_ms=backward_weight,
            parameter_bytes=0,
            activation_bytes=0,
            boundary_bytes=size,
        )
        for i, (forward, backward_input, backward_weight, size) in enumerate(layers)
    )
    return Profile(
        network="hand", batch_size=1, device="cpu", threads=1, memory_format="contiguous", layers=costs
    )  # fmt: skip


def test_balance_counts_both_backward_parts_and_every_forward_pass() -> None:
    forward_heavy, weight_heavy = (4.0, 0.0, 0.0, 1), (1.0, 1.0, 6.0, 1)
    profile = profile_of(forward_heavy, forward_heavy, weight_heavy)
    assert balance(profile, 2) == Partition(boundaries=(0, 2, 3))  # 4 4 | 8
    assert balance(profile, 2, forward_passes=3) == Partition(
        boundaries=(0, 1, 3)
    )  # 12 | 12 10 is worse than 12 12 | 10


def test_balance_takes_the_narrower_of_two_equal_cuts() -> None:
    profile = profile_of((2.0, 0.0, 0.0, 100), (0.0, 0.0, 0.0, 10), (2.0, 0.0, 0.0, 100))
    assert balance(profile, 2) == Partition(boundaries=(0, 2, 3))


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match=r"5 stages need 5 layers but the chain has 2; ask for at most 2 stages"):
        balance_costs([1, 2], 5)


def test_no_stage() -> None:
    with pytest.raises(ValueError, match=r"num_stages is 0 but must be at least 1"):
        balance_costs([1, 2], 0)


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_a_cost_that_is_none(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"the cost of layer 2 is {bad} but must be finite and not negative"):
        balance_costs([1.0, 0.0, bad], 2)
    with pytest.raises(ValueError, match=r"the cut cost of layer 1 is"):
        balance_costs([1.0, 0.0], 2, cut_costs=[0.0, bad])


def test_cut_costs_of_another_chain() -> None:
    with pytest.raises(ValueError, match=r"1 cut costs for 2 layers"):
        balance_costs([1.0, 0.0], 2, cut_costs=[0.0])


def test_no_forward_pass() -> None:
    with pytest.raises(ValueError, match=r"forward_passes is 0 but"):
        balance(profile_of((1.0, 1.0, 1.0, 1)), 1, forward_passes=0)
