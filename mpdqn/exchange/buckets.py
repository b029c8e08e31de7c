"""Buckets: many small tensors travel as a few large ones.

.grad  [conv1.w][conv1.b][fc.w ............][head.w]      copied into
bucket [conv1.w conv1.b fc.w ....][head.w]                at most `limit` bytes each, in the parameters' order
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def make_buckets(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Split ``tensors``, in order, into runs of one dtype and at most ``limit`` bytes; a larger one travels alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and (size + nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket
