"""From what each rank saw of a layout's steps to the values of one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mpdqn.bench.layouts import Layout
from mpdqn.plan import Profile
from mpdqn.records import Value
from mpdqn.schedule.tables import bubble_fraction
from mpdqn.timeline import Timeline

COMPUTE = ("F", "B", "T", "D")


@dataclass(frozen=True, kw_only=True)
class RankMeasurement:
    """One rank's share of a layout's timed steps; times are seconds, of one step on average.

    ``pipeline_s`` runs from the start of a step to the end of the last action of this rank; ``exchange_s`` is the sum
    of gradients over replicas and of the norm over stages, waiting for the slowest rank included.
    """

    step_s: float
    compute_s: float
    pipeline_s: float
    exchange_s: float
    optimizer_s: float
    bytes_sent: int
    peak_memory_bytes: int

    @classmethod
    def of(
        cls, rank: int, timelines: Sequence[Timeline], seconds: float, bytes_sent: int, peak_memory_bytes: int
    ) -> RankMeasurement:
        """The measurement of ``rank`` from the timeline of each step and the ``seconds`` that all took."""
        return cls(
            step_s=seconds / len(timelines),
            compute_s=fmean(t.busy(rank, *COMPUTE) for t in timelines),
            pipeline_s=fmean(max((s.end for s in t.spans if s.kind in COMPUTE), default=0.0) for t in timelines),
            exchange_s=fmean(t.busy(rank, "exchange") for t in timelines),
            optimizer_s=fmean(t.busy(rank, "optimizer") for t in timelines),
            bytes_sent=bytes_sent // len(timelines),
            peak_memory_bytes=peak_memory_bytes,
        )


def combine(
    layout: Layout, ranks: Sequence[RankMeasurement], batch_size: int, profile: Profile, num_passes: int
) -> Mapping[str, Value]:
    """The values of a record, from all ranks of ``layout`` in the order of their ranks.

    A rank's bubble is the share of its replica's pipeline phase in which it ran no action. The phase is that of the
    first stage, which begins with the batch in hand and runs the last action of every schedule here. A rank's wait for
    that last action is taken out of its exchange time.
    """
    step_s = max(rank.step_s for rank in ranks)
    depth = len(ranks) // (layout.copies * layout.data)
    bubbles, exchange = [], []
    for first in range(0, len(ranks), depth):
        replica = ranks[first : first + depth]
        phase = replica[0].pipeline_s
        bubbles += [max(0.0, 1 - rank.compute_s / phase) for rank in replica]
        exchange += [max(0.0, rank.exchange_s - (phase - rank.pipeline_s)) for rank in replica]
    formula = bubble_fraction(depth, layout.num_microbatches, profile.forward_ms, profile.backward_ms, num_passes)
    return {
        "transitions_per_s": layout.copies * batch_size / step_s,
        "step_s": step_s,
        "bubble_measured": fmean(bubbles) if depth > 1 else 0.0,
        "bubble_formula": formula,
        "compute_s": [rank.compute_s for rank in ranks],
        "exchange_s": exchange,
        "optimizer_s": [rank.optimizer_s for rank in ranks],
        "bytes_sent": [rank.bytes_sent for rank in ranks],
        "peak_memory_bytes": [rank.peak_memory_bytes for rank in ranks],
    }
