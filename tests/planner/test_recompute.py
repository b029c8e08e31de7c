"""`choose_recomputation`: fits, costs little beside brute force, and says so when nothing fits."""

import itertools

import pytest

from mpdqn.plan import RECOMPUTATION, Partition, Profile
from mpdqn.planner.costs import action_times, activation_bytes, stages_run_again
from mpdqn.planner.order import best_table
from mpdqn.planner.recompute import choose_recomputation
from mpdqn.planner.simulate import pace, peak_activations
from tests.planner.profiles import MIB, any_profile

STEP = {"num_microbatches": 6, "passes": "TD", "ahead": "T"}


def price(
    profile: Profile, partition: Partition, schedule: str, p: int, modes: tuple[str, ...]
) -> tuple[float, list[float]]:
    times = action_times(profile, partition, "TD", modes)
    table = best_table(schedule, p, 6, "TD", ahead="T", times=times, recompute=stages_run_again(modes))
    kept, rebuilt = activation_bytes(profile, partition, modes)
    return pace(table, times).step_s, [peak_activations(lane, kept, rebuilt) for lane in table.lanes]


@pytest.mark.parametrize(
    ("schedule", "p", "v"), [("1f1b", 3, 1), ("td1f1b", 3, 1), ("tdzb", 3, 1), ("zbv", 2, 2), ("gpipe", 2, 1)]
)
@pytest.mark.parametrize("share", [1.0, 0.7, 0.5])
def test_it_fits_and_costs_little_more_than_the_best_of_all_choices(schedule: str, p: int, v: int, share: float):
    profile, partition = any_profile(p, p * v)
    none = price(profile, partition, schedule, p, ("none",) * (p * v))
    limits = [share * peak for peak in none[1]]
    every = [price(profile, partition, schedule, p, modes) for modes in itertools.product(RECOMPUTATION, repeat=p * v)]
    fitting = [step for step, peaks in every if all(a <= b for a, b in zip(peaks, limits, strict=True))]
    if not fitting:
        with pytest.raises(ValueError, match="the activations take at least"):
            choose_recomputation(profile, partition, schedule=schedule, num_lanes=p, memory_bytes=limits, **STEP)
        return
    modes = choose_recomputation(profile, partition, schedule=schedule, num_lanes=p, memory_bytes=limits, **STEP)
    step, peaks = price(profile, partition, schedule, p, modes)
    assert all(peak <= limit for peak, limit in zip(peaks, limits, strict=True))
    assert step <= 1.05 * min(fitting)
    if share == 1.0:
        assert modes == ("none",) * (p * v)


def test_only_the_lane_that_is_over_its_limit_recomputes():
    profile, partition = any_profile(7, 3)
    limits = [1e12, 30 * MIB, 1e12]
    modes = choose_recomputation(profile, partition, schedule="1f1b", num_lanes=3, memory_bytes=limits, **STEP)
    assert modes[0] == modes[2] == "none"
    assert modes[1] != "none"


def test_nothing_fits():
    profile, partition = any_profile(7, 2)
    with pytest.raises(
        ValueError, match=r"take at least \d+\.\d MiB on lane 0 but its limit is 1\.0 MiB; use more micro"
    ):
        choose_recomputation(profile, partition, schedule="1f1b", num_lanes=2, memory_bytes=[1 * MIB, 1e12], **STEP)


def test_a_limit_for_each_lane():
    profile, partition = any_profile(7, 2)
    with pytest.raises(ValueError, match="there are 1 memory limits for 2 lanes; give one for each"):
        choose_recomputation(profile, partition, schedule="1f1b", num_lanes=2, memory_bytes=[1e12], **STEP)
