"""`Prefetcher`: the next batch is gathered in a thread while the current one trains.

main thread    draw k+1 · start │ learn k ………………………… │ return TD errors k │ result k+1 · draw k+2 · start …
its thread                      │ gather k+1, pin, copy │
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mpdqn.dqn.batch import Batch


class Prefetcher:
    """One batch at a time, made in one background thread and brought to a device.

    For a CUDA device the batch goes through pinned memory and is copied on a stream of its own, frames as uint8, so
    that the copy runs beside the computation; `result` has the current stream wait for it. What is made must not change
    what the main thread reads or writes meanwhile: `VirtualShards.gather` may run beside everything but `append`.

    Args:
        device: where the batches go.
        dtype: of rewards, discounts and weights; `Batch.to` with the same two arguments then copies nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # It has torch threads of its own; one leaves the learner its own.
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=torch.set_num_threads, initargs=(1,))
        self._coming: Future[Batch] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self, make: Callable[[], Batch]) -> None:
        """Begin to make a batch, such as ``lambda: shards.gather(draw)``.

        Raises:
            RuntimeError: if the one before was not fetched, or after `close`.
        """
        if self._coming is not None:
            raise RuntimeError("a batch is under way already; fetch it with result() before the next start()")
        self._coming = self._thread.submit(self._bring, make)

    def result(self) -> Batch:
        """The batch that was started, on the device; waits for it. What its making raised is raised here.

        Raises:
            RuntimeError: if none was started.
        """
        if self._coming is None:
            raise RuntimeError("no batch is under way; start() one first")
        coming, self._coming = self._coming, None
        batch = coming.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for f in fields(batch):
                getattr(batch, f.name).record_stream(current)  # its memory was allocated on the other stream
        return batch

    def close(self) -> None:
        """Wait for what is under way, drop it, and end the thread."""
        self._coming = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _bring(self, make: Callable[[], Batch]) -> Batch:
        batch = make()
        if self._stream is None:
            return batch.to(self._device, self._dtype)
        # Pinned memory may be freed as soon as the copy is queued: its allocator waits for the stream.
        with torch.cuda.stream(self._stream):
            pinned = type(batch)(**{f.name: _pinned(getattr(batch, f.name)) for f in fields(batch)})
            return pinned.to(self._device, self._dtype)


def _pinned(tensor: Tensor) -> Tensor:
    """A contiguous copy in pinned memory; obs and next_obs may be views with gaps, which are copied more slowly."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
