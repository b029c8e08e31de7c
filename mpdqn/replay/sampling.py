"""Which rows of a shard can be drawn, and how often: uniformly, or in proportion to priorities.

A row *enters* when its transition is complete and *leaves* when the ring takes its frames. Both samplers know rows only
by number; what is drawn depends on the rows that are in and on the stream's name, on nothing else.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# TorchRL exports the trees that its PrioritizedSampler draws with. The sampler itself cannot serve: none of its rows
# can be kept out of a draw (epsilon is added to every priority), its mass is drawn from as a whole and not in slices,
# and its weights are relative to its own smallest priority, where V shards share one.
from torchrl.data.replay_buffers.samplers import MinSegmentTreeFp64, SumSegmentTreeFp64

from mpdqn.dqn.prioritization import Prioritization
from mpdqn.randomness import keyed_bytes

Rows = NDArray[np.int64]
Key = tuple[str | int, ...]
"""Name of a random stream."""


class Sampler(Protocol):
    """What a shard asks of a way to draw."""

    count: int
    """Rows that are in."""

    def enter(self, rows: Rows) -> None:
        """``rows``, all different and none of them in, can be drawn from now on."""

    def leave(self, rows: Rows) -> None:
        """``rows``, all different, can no longer be drawn; those that are out already stay so."""

    def draw(self, count: int, key: Key) -> tuple[Rows, NDArray[np.float64] | None]:
        """``count`` rows [count] with replacement, and each one's share of the shard's mass (None: all the same)."""

    def update(self, rows: Rows, magnitudes: NDArray[np.float64]) -> None:
        """|δ| of ``rows`` has become known."""

    @property
    def lowest(self) -> float:
        """The smallest share of the mass that any row has which is in; infinite if none matters."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all that it holds."""

    def tensors(self) -> dict[str, Tensor]:
        """The state, not copied; after another one was copied in, call `reload`."""

    def reload(self) -> None:
        """Derive what follows from `tensors`."""


def make_sampler(num_envs: int, length: int, prioritization: Prioritization | None) -> Sampler:
    """The sampler of a shard with ``num_envs`` rings of ``length`` rows."""
    if prioritization is None:
        return UniformSampler(num_envs, length)
    return ProportionalSampler(num_envs * length, prioritization)


class UniformSampler:
    """Every row that is in is as likely as any other."""

    lowest = float("inf")

    def __init__(self, num_envs: int, length: int) -> None:
        self._sampleable = torch.zeros(num_envs * length, dtype=torch.bool)
        self._in = self._sampleable.numpy()
        self._num_envs, self._length = num_envs, length
        # While the rings fill for the first time, draws reach no further than the newest row that ever was in.
        self._reached = torch.zeros(1, dtype=torch.int64)
        self._reach, self.count = 0, 0

    def enter(self, rows: Rows) -> None:
        """See `Sampler`."""
        self._in[rows] = True
        self.count += len(rows)
        self._reach_for(rows)

    def leave(self, rows: Rows) -> None:
        """See `Sampler`."""
        self.count -= int(self._in[rows].sum())
        self._in[rows] = False

    def draw(self, count: int, key: Key) -> tuple[Rows, None]:
        """See `Sampler`."""
        rows = self._candidates(count, (*key, 0))
        is_in = self._in.take(rows)
        again = 0
        while not is_in.all():  # few of the rows within reach are out; a number that falls on one is drawn again
            again += 1
            out = ~is_in
            rows[out] = self._candidates(int(out.sum()), (*key, again))
            is_in = self._in.take(rows)
        return rows, None

    def update(self, rows: Rows, magnitudes: NDArray[np.float64]) -> None:
        """Nothing depends on them."""

    @property
    def num_bytes(self) -> int:
        """See `Sampler`."""
        return self._in.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """See `Sampler`."""
        return {"sampleable": self._sampleable, "reach": self._reached}

    def reload(self) -> None:
        """See `Sampler`."""
        self.count, self._reach = int(self._in.sum()), int(self._reached[0])

    def _candidates(self, count: int, key: Key) -> Rows:
        place = (_uniform(count, key) * (self._num_envs * self._reach)).astype(np.int64)
        ring, offset = np.divmod(place, self._reach)
        rows: Rows = ring * self._length + offset
        return rows

    def _reach_for(self, rows: Rows) -> None:
        if self._reach < self._length and len(rows):
            self._reach = max(self._reach, int((rows % self._length).max()) + 1)
            self._reached[0] = self._reach


class ProportionalSampler:
    """Rows are drawn in proportion to their priority p = (|δ| + ε)^α, one from each of ``count`` equal slices of mass.

    A row enters with the largest priority that the shard has seen, 1 at first, so that it is soon drawn. Schaul et al.
    2016, algorithm 1 and appendix B.2.1 (the slices).
    """

    def __init__(self, num_rows: int, prioritization: Prioritization) -> None:
        self._alpha, self._epsilon = prioritization.alpha, prioritization.epsilon
        # The trees hold the same numbers as their leaves; each inner node is computed from its two children alone, so
        # that trees built from these tensors are equal to those that grew update by update.
        self._tensors = {
            "priority": torch.zeros(num_rows, dtype=torch.float64),  # 0: the row cannot be drawn
            "largest_priority": torch.ones(1, dtype=torch.float64),
        }
        self._priority, self._largest = (tensor.numpy() for tensor in self._tensors.values())
        self.reload()

    def enter(self, rows: Rows) -> None:
        """See `Sampler`."""
        if len(rows):
            self._set(rows, np.full(len(rows), self._largest[0]))
            self.count += len(rows)

    def leave(self, rows: Rows) -> None:
        """See `Sampler`."""
        rows = rows[self._priority[rows] > 0]
        if len(rows):
            self._priority[rows] = 0.0
            self._sum[rows] = 0.0
            self._min[rows] = self._min.identity_element
            self.count -= len(rows)

    def draw(self, count: int, key: Key) -> tuple[Rows, NDArray[np.float64]]:
        """See `Sampler`."""
        total = self._total
        mass = (np.arange(1, count + 1) - _uniform(count, key)) * (
            total / count
        )  # slice i is (i, i+1]·total/count: never 0
        rows = self._sum.scan_lower_bound(np.minimum(mass, total))
        # Where the tree's rounded sums leave a crumb of mass beside the last row of a branch, that row is meant.
        while not (priority := self._priority.take(rows)).all():
            rows = np.where(priority > 0, rows, rows - 1)
        return rows, priority / total

    def update(self, rows: Rows, magnitudes: NDArray[np.float64]) -> None:
        """See `Sampler`; ValueError if one is not finite."""
        is_in = self._priority[rows] > 0
        rows, magnitudes = rows[is_in], magnitudes[is_in]
        if not np.isfinite(magnitudes).all():
            wrong = magnitudes[~np.isfinite(magnitudes)]
            raise ValueError(
                f"{len(wrong)} of {len(magnitudes)} TD errors are not finite, the first is {wrong[0]}, and have no "
                "priority; the network has diverged: lower the learning rate or clip gradients"
            )
        if len(rows):
            priority = (magnitudes + self._epsilon) ** self._alpha
            self._set(rows, priority)
            self._largest[0] = max(self._largest[0], priority.max())

    @property
    def lowest(self) -> float:
        """See `Sampler`."""
        return float(self._min.query(0, len(self._priority)) / self._total) if self.count else float("inf")

    @property
    def num_bytes(self) -> int:
        """See `Sampler`; a tree over n leaves has 2·2ᵏ nodes of 8 bytes, 2ᵏ > n."""
        return int(self._priority.nbytes + self._largest.nbytes + 16 * (self._sum.capacity + self._min.capacity))

    def tensors(self) -> dict[str, Tensor]:
        """See `Sampler`."""
        return self._tensors

    def reload(self) -> None:
        """See `Sampler`."""
        self._sum, self._min = SumSegmentTreeFp64(len(self._priority)), MinSegmentTreeFp64(len(self._priority))
        rows = self._priority.nonzero()[0]
        self._set(rows, self._priority[rows])
        self.count = len(rows)

    @property
    def _total(self) -> float:
        return float(self._sum.query(0, len(self._priority)))

    def _set(self, rows: Rows, priority: NDArray[np.float64]) -> None:
        self._priority[rows] = priority
        self._sum[rows] = priority
        self._min[rows] = priority


def _uniform(count: int, key: Key) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1), multiples of 2⁻⁵³, from the stream ``key``."""
    return (np.frombuffer(keyed_bytes(8 * count, *key), "<u8") >> 11).astype(np.float64) * 2.0**-53
