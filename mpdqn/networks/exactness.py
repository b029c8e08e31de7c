"""Which layers would make micro-batches or replicas compute something else than one process does."""

from __future__ import annotations

from torch import nn

BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
    nn.SyncBatchNorm,
)
INSTANCE_NORMS = (
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d,
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def check_exactness(network: nn.Module) -> None:
    """Raise ValueError, with the layer's name, if a layer couples the frames of a batch or draws unkeyed randomness.

    Seen by type: BatchNorm, InstanceNorm that tracks running statistics, and Dropout with p > 0. What a ``forward``
    computes by functions of its own can't be seen from outside.
    """
    for name, layer in network.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, BATCH_NORMS) or (isinstance(layer, INSTANCE_NORMS) and layer.track_running_stats):
            raise ValueError(
                f"layer {name!r} is a {kind}, whose statistics depend on how the batch is cut: micro-batches and "
                "replicas would not compute what one process computes; use nn.GroupNorm"
            )
        if isinstance(layer, DROPOUTS) and layer.p > 0:
            raise ValueError(
                f"layer {name!r} is a {kind}({layer.p}), which draws in the order of execution: micro-batches and "
                "replicas would not compute what one process computes; remove it or set p = 0"
            )
