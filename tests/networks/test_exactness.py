from collections import OrderedDict

import pytest
import torch
from torch import nn

from mpdqn.networks import NAMES, check_exactness, make_network


@pytest.mark.parametrize("name", NAMES)
def test_the_zoo_is_exact(name: str) -> None:
    with torch.device("meta"):
        check_exactness(make_network(name, (4, 84, 84), 3))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.Dropout(0.1),
        nn.Dropout2d(0.5),
    ],
)
def test_layers_that_break_exactness_are_named(layer: nn.Module) -> None:
    inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1), bad=layer))
    with pytest.raises(
        ValueError, match=rf"'stem\.bad' is a {type(layer).__name__}.*micro-batches.*(use nn.GroupNorm|set p = 0)"
    ):
        check_exactness(nn.Sequential(OrderedDict(stem=inner)))


@pytest.mark.parametrize("layer", [nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.LayerNorm(3), nn.Dropout(0.0)])
def test_layers_that_keep_frames_apart_pass(layer: nn.Module) -> None:
    check_exactness(nn.Sequential(layer))


def test_micro_batches_compute_what_the_batch_computes() -> None:
    frames = torch.randint(0, 256, (4, 2, 33, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("impala", "resnet18"):
        network = make_network(name, (2, 33, 33), 3, fc=8).double()
        parts = torch.cat([network(part) for part in frames.split(1)])
        torch.testing.assert_close(parts, network(frames), rtol=1e-10, atol=1e-10)
