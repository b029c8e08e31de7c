"""`BatchQueue`: the batches of a replica, each drawn as early as the algorithm's settings say.

With ``lookahead`` + ``prefetch`` = n, the batch of update u is drawn just before update u − n, from what replay holds
then, in every layout alike. With ``prefetch`` it is put together while update u − n trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from mpdqn.dqn.batch import Batch
from mpdqn.learner import LearnStep
from mpdqn.replay import Prefetcher, VirtualShards


class BatchQueue:
    """Batches of the owned ``shards`` for one update after the other.

    Args:
        shards: the replica's.
        batch_size: of all replicas together.
        lookahead: 0 or 1, see `LearnerConfig`.
        prefetch: 0 or 1.
        prefetcher: puts batches together, in the background.
        agree: from this process's least probability of a transition to that of all processes. Collective, as all draws
            are.
    """

    def __init__(
        self,
        shards: VirtualShards,
        *,
        batch_size: int,
        lookahead: int,
        prefetch: int,
        prefetcher: Prefetcher,
        agree: Callable[[float], float],
    ) -> None:
        self._shards, self._batch_size, self._agree = shards, batch_size, agree
        self._lookahead, self._prefetch, self._prefetcher = lookahead, prefetch, prefetcher
        self._prioritized = shards.prioritized
        self._ready: deque[Batch] = deque()
        self._under_way = False

    def batches(self, update: int) -> tuple[Batch, Batch | None]:
        """The batch of ``update``, counted from 0, and with lookahead the next one."""
        self.settle()
        while len(self._ready) <= self._lookahead:
            self._start(update + len(self._ready))
            self.settle()
        if self._prefetch:
            self._start(update + len(self._ready))
        return self._ready[0], self._ready[1] if self._lookahead else None

    def learned(self, batch: Batch, step: LearnStep) -> None:
        """Give the errors of an update back to shards that prioritise; its batch leaves the queue."""
        self._ready.popleft()
        if not self._prioritized:  # on a GPU, to fetch them holds the host
            return
        assert step.td_errors is not None
        self._shards.return_td_errors(batch.index.cpu(), step.td_errors.cpu())

    @property
    def waiting(self) -> tuple[Batch, ...]:
        """The batches that are drawn and not yet learned from, the next one first."""
        self.settle()
        return tuple(self._ready)

    def go_on_with(self, batches: Sequence[Batch]) -> None:
        """Have ``batches`` as those that are drawn already."""
        self._ready = deque(batches)

    def settle(self) -> None:
        """Wait for what is being put together: the rows that it reads may be overwritten next."""
        if self._under_way:
            self._ready.append(self._prefetcher.result())
            self._under_way = False

    def _start(self, update: int) -> None:
        """Draw the batch of ``update`` now, and begin to put it together."""
        draw = self._shards.draw(self._batch_size, update)
        lowest = None if draw.probability is None else self._agree(draw.lowest)
        self._prefetcher.start(lambda: self._shards.gather(draw, lowest))
        self._under_way = True
