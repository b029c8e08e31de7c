"""`Message`: a message between ranks that is under way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor

from mpdqn.heartbeat import NO_LIMIT


class Message:
    """A message under way. Holds its tensor, because a buffer that is freed before it was sent is another's memory."""

    def __init__(
        self,
        work: dist.Work | None,
        tensor: Tensor,
        group: dist.ProcessGroup,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """A message that ``work`` carries over ``group``; None for one that has no peer.

        ``waiting`` notes, inside its context, what this rank waits for, and names the peer if that is gone.
        """
        self._work, self.tensor, self._group, self._waiting = work, tensor, group, waiting

    def done(self) -> bool:
        """Return whether `wait` would return at once.

        On a GPU it always would, but would hold the stream up: False. To ask NCCL instead would let a rank start its
        next collective before another rank's messages, and NCCL can deadlock when ranks disagree on that order.
        """
        return self._work is None or (not self.tensor.is_cuda and self._work.is_completed())

    def wait(self) -> None:
        """Wait for the end of the message (on a GPU: make the current stream wait).

        Raises:
            PeerLost: if the peer is gone. One that is silent ends this process (`mpdqn.heartbeat`).
        """
        if self._work is None:
            return
        with self._waiting():
            if self.tensor.is_cuda and dist.get_backend(self._group) == "nccl":
                self._work.wait()  # with a limit it would hold the host
            else:
                self._work.wait(NO_LIMIT)
