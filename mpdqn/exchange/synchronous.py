"""Synchronous exchange: the gradients of a stage are summed over its replicas before every optimizer step.

The loss is divided by the global batch size once, so the replicas' gradients are *summed*; the result is the gradient
of the whole batch, and the update is exactly that of a single process.

    stage 1  … B2 B3 | start ═════ sum under way ═════▶ finish        the sum of a stage begins when its last backward
    stage 0  … B1 ·  B2 ·  B3 | start ═══▶ finish                     has ended, while the pipeline still drains
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpdqn.exchange.buckets import make_buckets
from mpdqn.mesh import Mesh
from mpdqn.message import Message

BUCKET_BYTES = 25 * 2**20
"""As in torch's DistributedDataParallel (Li et al. 2020): large enough for bandwidth, small enough to overlap."""


class SynchronousExchange:
    """Sums gradients over replicas, bucket by bucket, each bucket under way while the next one is filled."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._under_way: list[tuple[Message, Tensor, list[Tensor]]] = []

    def start(self, stage: int, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to sum the gradients of ``parameters``, all that ``stage`` has, over the replicas.

        Every replica starts its stages in the same order, and adds nothing to these gradients until `finish`.
        """
        group = self._mesh.replica_groups[stage]
        if dist.get_world_size(group) == 1:
            return
        for gradients in make_buckets((p.grad for p in parameters if p.grad is not None), BUCKET_BYTES):
            bucket = torch.cat([g.reshape(-1) for g in gradients])
            message = self._mesh.sum_over(group, bucket, f"the gradient sum of stage {stage}")
            self._under_way.append((message, bucket, gradients))

    def done(self) -> bool:
        """Whether `finish` would not wait."""
        return all(message.done() for message, _, _ in self._under_way)

    def finish(self) -> None:
        """Replace each ``.grad`` of the started stages by its sum over the replicas.

        Raises:
            PeerLost: if a replica is gone or silent.
        """
        for message, bucket, gradients in self._under_way:
            message.wait()
            for gradient, part in zip(gradients, torch.split(bucket, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))
        self._under_way = []
