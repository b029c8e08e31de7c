"""`BatchQueue`: the batches of a replica, each drawn as early as the algorithm's settings say.

With ``lookahead`` + ``prefetch`` = n, the batch of update u is drawn just before update u − n, from what replay holds
then, in every layout alike. With ``prefetch`` it is put together while update u − n trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

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
        self._lookahead, self._ahead = lookahead, lookahead + prefetch
        self._prefetcher = prefetcher
        self._drawn: deque[Future[Batch]] = deque()

    def batches(self, update: int) -> tuple[Batch, Batch | None]:
        """The batch of ``update``, counted from 0, and with lookahead the next one."""
        first = update + len(self._drawn)
        for later in range(first, update + self._ahead + 1):
            self._drawn.append(self._draw(later))
        return self._drawn[0].result(), self._drawn[1].result() if self._lookahead else None

    def learned(self, batch: Batch, step: LearnStep) -> None:
        """Give the errors of an update back to the shards; its batch leaves the queue."""
        self._drawn.popleft()
        assert step.td_errors is not None
        self._shards.return_td_errors(batch.index.cpu(), step.td_errors.cpu())

    def settle(self) -> None:
        """Wait for what is being put together: the rows that it reads may be overwritten next."""
        for future in self._drawn:
            future.result()

    def waiting(self) -> Sequence[Batch]:
        """The batches that are drawn and were not learned from yet."""
        return [future.result() for future in self._drawn]

    def _draw(self, update: int) -> Future[Batch]:
        draw = self._shards.draw(self._batch_size, update)
        lowest = None if draw.probability is None else self._agree(draw.lowest)
        return self._prefetcher.submit(lambda: self._shards.gather(draw, lowest))
