"""From what each rank saw of a layout's steps to the values of one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mpdqn.arrangement import Arrangement
from mpdqn.records import Value
from mpdqn.timeline import LATE, Timeline

NO_WORK = ("exchange", "optimizer", LATE)
"""Kinds of spans in which no action runs; the late passes' own spans lie within theirs."""


@dataclass(frozen=True, kw_only=True)
class RankMeasurement:
    """One rank's share of a layout's timed steps; times are seconds, of one step on average.

    ``exchange_s`` is what a rank waits at the end of its actions for the gradients of replicas and the norm of all
    stages, the slowest rank's work included. ``late_pass_s`` is what target passes take that could not run ahead, as
    once after every target refresh; 0 for schedules that run none ahead. ``compiled_modules`` counts those that ran as
    torch.compile compiled them.
    """

    step_s: float
    compute_s: float
    exchange_s: float
    optimizer_s: float
    bytes_sent: int
    peak_memory_bytes: int
    late_pass_s: float = 0.0
    compiled_modules: int = 0

    @classmethod
    def of(
        cls,
        rank: int,
        timelines: Sequence[Timeline],
        seconds: float,
        bytes_sent: int,
        peak_memory_bytes: int,
        late_pass_s: float = 0.0,
        compiled_modules: int = 0,
    ) -> RankMeasurement:
        """The measurement of ``rank`` from the timeline of each step and the ``seconds`` that all took."""
        work = {span.kind for timeline in timelines for span in timeline.spans} - set(NO_WORK)
        return cls(
            step_s=seconds / len(timelines),
            compute_s=fmean(t.busy(rank, *work) if work else 0.0 for t in timelines),
            exchange_s=fmean(t.busy(rank, "exchange") for t in timelines),
            optimizer_s=fmean(t.busy(rank, "optimizer") for t in timelines),
            bytes_sent=bytes_sent // len(timelines),
            peak_memory_bytes=peak_memory_bytes,
            late_pass_s=late_pass_s,
            compiled_modules=compiled_modules,
        )


def combine(arrangement: Arrangement, ranks: Sequence[RankMeasurement], batch_size: int) -> Mapping[str, Value]:
    """The values of a record, from all ranks of a layout in the order of their ranks.

    A rank's bubble is the share of a step, apart from exchange and optimizer, in which it ran no action. What the rank
    of its replica that waits least spends on the exchange is taken for its cost; the others also wait for that rank.
    """
    layout = arrangement.layout
    step_s = max(rank.step_s for rank in ranks)
    depth = len(ranks) // (layout.copies * layout.data)
    bubbles, exchange = [], []
    for first in range(0, len(ranks), depth):
        replica = ranks[first : first + depth]
        least = min(rank.exchange_s for rank in replica)
        exchange += [least] * depth
        bubbles += [max(0.0, 1 - rank.compute_s / (step_s - least - rank.optimizer_s)) for rank in replica]
    return {
        "transitions_per_s": layout.copies * batch_size / step_s,
        "step_s": step_s,
        "bubble_measured": fmean(bubbles) if depth > 1 else 0.0,
        "bubble_simulated": arrangement.bubble if depth > 1 else 0.0,
        "compute_s": [rank.compute_s for rank in ranks],
        "exchange_s": exchange,
        "optimizer_s": [rank.optimizer_s for rank in ranks],
        "late_pass_s": max(rank.late_pass_s for rank in ranks),
        "bytes_sent": [rank.bytes_sent for rank in ranks],
        "peak_memory_bytes": [rank.peak_memory_bytes for rank in ranks],
        "compiled_modules": [rank.compiled_modules for rank in ranks],
    }
