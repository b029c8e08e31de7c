"""`choose_recomputation`: which stages compute their forward again, so that every lane's activations fit.

            ████
limit  ─────────────────────      lane 1 is over: of the switches of its stages (none ─▶ boundaries or all) take
       ████ ████ ████ ██          the one that costs the least time per byte saved, until no lane is over
lane   0    1    2    3
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from mpdqn.plan import RECOMPUTATION, Partition, Profile
from mpdqn.planner.costs import action_times, activation_bytes, stages_run_again
from mpdqn.planner.order import best_table
from mpdqn.planner.simulate import pace, peak_activations
from mpdqn.schedule import lane_of_stages

Modes = tuple[str, ...]

MIB = 2**20


def choose_recomputation(
    profile: Profile,
    partition: Partition,
    *,
    schedule: str,
    num_lanes: int,
    num_microbatches: int,
    passes: str,
    ahead: str,
    virtual: int | None = None,
    memory_bytes: Sequence[float],
) -> Modes:
    """The recomputation of each stage, one of `RECOMPUTATION`, that costs little time and fits on every lane.

    Starts with none. While lanes are over their limits, of the stages of the worst lane that one is switched whose
    switch costs the least simulated time per byte saved; at the end each of these takes the fastest that still fits.
    What fits is the simulated peak of the activations in the table that `best_table` gives for the choice: parameters,
    gradients, messages and no-gradient passes are the caller's, to be taken off the limit.

    Args:
        profile: the layers, measured on one micro-batch.
        partition: the stages.
        schedule, num_lanes, num_microbatches, passes, ahead, virtual: the step, as in `action_table`.
        memory_bytes: by lane, the most that its activations may take.

    Raises:
        ValueError: if nothing fits, with the least peak found on the lane that is over its limit, and the limit.
    """
    if len(memory_bytes) != num_lanes:
        raise ValueError(f"there are {len(memory_bytes)} memory limits for {num_lanes} lanes; give one for each")
    lane_of = lane_of_stages(schedule, num_lanes, partition.num_stages // num_lanes if virtual is None else virtual)

    @cache
    def price(modes: Modes) -> tuple[float, tuple[float, ...]]:
        """Seconds of a step, and the peak of the activations on each lane in bytes."""
        times = action_times(profile, partition, passes, modes)
        table = best_table(
            schedule,
            num_lanes,
            num_microbatches,
            passes,
            ahead=ahead,
            times=times,
            virtual=virtual,
            recompute=stages_run_again(modes),
        )
        kept, rebuilt = activation_bytes(profile, partition, modes)
        return pace(table, times).step_s, tuple(peak_activations(lane, kept, rebuilt) for lane in table.lanes)

    def over(modes: Modes) -> list[float]:
        """Bytes over the limit, by lane."""
        return [max(0.0, peak - limit) for peak, limit in zip(price(modes)[1], memory_bytes, strict=True)]

    def switched(modes: Modes, stage: int) -> list[Modes]:
        return [(*modes[:stage], mode, *modes[stage + 1 :]) for mode in RECOMPUTATION if mode != modes[stage]]

    now: Modes = (RECOMPUTATION[0],) * partition.num_stages
    while sum(over(now)):
        worst = max(range(num_lanes), key=lambda lane: over(now)[lane])
        choices = [modes for stage, lane in enumerate(lane_of) if lane == worst for modes in switched(now, stage)]
        saved = {modes: sum(over(now)) - sum(over(modes)) for modes in choices}
        useful = [modes for modes in choices if saved[modes] > 0]
        if not useful:
            least = min(price(modes)[1][worst] for modes in (now, *choices))
            raise ValueError(
                f"the activations take at least {least / MIB:.1f} MiB on lane {worst} but its limit is "
                f"{memory_bytes[worst] / MIB:.1f} MiB; use more micro-batches, more stages or a smaller batch"
            )
        before_s = price(now)[0]
        # Equal costs (none, where the lane waits anyway) go to the one that saves most.
        now = min(useful, key=lambda modes: ((price(modes)[0] - before_s) / saved[modes], -saved[modes]))
    for stage in [stage for stage, mode in enumerate(now) if mode != RECOMPUTATION[0]]:
        fitting = [modes for modes in switched(now, stage) if not sum(over(modes))]
        now = min([now, *fitting], key=lambda modes: price(modes)[0])
    return now
