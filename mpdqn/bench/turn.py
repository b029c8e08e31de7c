"""`Turn`: a layout while it is built: this rank's learner, and its replica's batches as training gets them.

main thread    draw u+1 ·             · learn u  │ draw u+2 ·             · learn u+1 │ … │ synchronise, read the clock
prefetcher's            gather u+1, pin          │          gather u+2, pin           │     and then the spans
copy stream                             copy u+1 │                          copy u+2  │

As in training without ``--prefetch``: a GPU copies a batch while it learns from the one before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from mpdqn.bench.measure import RankMeasurement
from mpdqn.cores import peak_memory
from mpdqn.dqn.batch import Batch
from mpdqn.learner import Learner, LearnStep
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.replay import Prefetcher, VirtualShards
from mpdqn.timeline import Timeline


class Turn:
    """One rank's part in a layout; a context manager, which ends the thread that gathers batches.

    Sampling is uniform, so TD errors stay where they are: to fetch them would hold the host on a GPU.

    Args:
        learner: this rank's stages.
        shards: replay, the same on every rank.
        owned: numbers of the shards from which this replica's batches come.
    """

    def __init__(self, learner: Learner, shards: VirtualShards, owned: Sequence[int]) -> None:
        self.learner, self._shards, self._owned = learner, shards, owned
        self._device = learner.mesh.device
        # Made after this rank was pinned: its thread has the cores of the rank.
        self._prefetcher = Prefetcher(self._device, torch.float32)
        self._announced: dict[int, Batch] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._prefetcher.close()

    def learn(self, update: int) -> LearnStep:
        """Make an update from batch ``update``. Collective over the layout's ranks."""
        if not self.learner.owns_shards:
            return self.learner.learn(None)
        batch = self._announced.pop(update, None)
        if batch is None:
            batch = self._batch(update)
        upcoming = None
        if self.learner.config.lookahead:
            upcoming = self._batch(update + 1)
            self._announced = {update + 1: upcoming}
        return self.learner.learn(batch, upcoming)

    def measure(self, steps: int, late_pass_s: float) -> RankMeasurement:
        """Time ``steps`` updates after the first one. Collective over the layout's ranks."""
        # A stopwatch for each update: a GPU's are read after the last one, since to read one waits for its update.
        watches = [Stopwatch(self.learner.mesh.rank, self._device) for _ in range(steps)]
        sent = 0
        synchronize(self._device)
        begin = time.perf_counter()
        for update, watch in enumerate(watches, start=1):
            self.learner.stopwatch = watch
            sent += self.learn(update).bytes_sent
        synchronize(self._device)
        seconds = time.perf_counter() - begin
        return RankMeasurement.of(
            self.learner.mesh.rank,
            [watch.timeline() for watch in watches],
            seconds,
            sent,
            peak_memory(self._device),
            late_pass_s,
            self.learner.compiled_modules,
        )

    def trace(self, updates: int) -> list[Timeline]:
        """Return the timelines of ``updates`` updates on this host's clock, each numbered as a step."""
        measured = []
        for update in range(updates):
            synchronize(self._device)  # the clocks of host and device meet where the device is idle
            self.learn(update)
            measured.append(self.learner.timeline().moved(self.learner.stopwatch.origin, update))
        return measured

    def _batch(self, update: int) -> Batch:
        draw = self._shards.draw(self.learner.batch_size, update, self._owned)
        self._prefetcher.start(lambda: self._shards.gather(draw))
        return self._prefetcher.result()


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
