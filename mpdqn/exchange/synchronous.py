"""Synchronous exchange: the gradients of a stage are summed over its replicas before every optimizer step.

The loss is divided by the global batch size once, so the replicas' gradients are *summed*; the result is the gradient
of the whole batch, and the update is exactly that of a single process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from mpdqn.exchange.buckets import make_buckets
from mpdqn.mesh import Mesh

BUCKET_BYTES = 25 * 2**20
"""As in torch's DistributedDataParallel (Li et al. 2020): large enough for bandwidth, small enough to overlap."""


class SynchronousExchange:
    """Sums gradients over replicas, bucket by bucket, each bucket under way while the next one is filled."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def reduce(self, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Replace each ``.grad`` by its sum over the replicas.

        Args:
            parameters: the parameters of each stage of this rank; every one has a gradient.

        Raises:
            PeerLost: if a replica is gone or silent.
        """
        under_way = []
        for stage, owned in parameters.items():
            group = self._mesh.replica_groups[stage]
            if dist.get_world_size(group) == 1:
                continue
            for gradients in make_buckets((p.grad for p in owned if p.grad is not None), BUCKET_BYTES):
                bucket = torch.cat([g.reshape(-1) for g in gradients])
                message = self._mesh.sum_over(group, bucket, f"the gradient sum of stage {stage}")
                under_way.append((message, bucket, gradients))
        for message, bucket, gradients in under_way:
            message.wait()
            for gradient, part in zip(gradients, torch.split(bucket, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))
