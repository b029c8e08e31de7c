"""`agree_on_acceleration`: precision and compilation of a layout, the same on every rank.

On the CPU nothing is measured: auto means float32, not compiled, so that two runs of one command give the same bits.
On a GPU rank 0 measures what auto leaves open, on the whole network and one micro-batch of the layout.
"""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor, nn

from mpdqn.mesh import World
from mpdqn.pipeline.acceleration import Acceleration, Precision, candidates, choose_acceleration


def agree_on_acceleration(
    world: World,
    network: nn.Sequential,
    frames: Tensor,
    *,
    precision: Precision | Literal["auto"],
    compile: Literal["auto", "on", "off"],
) -> Acceleration:
    """Return how the layers are computed, as rank 0 chose it. Collective over ``world``.

    Args:
        world: the ranks that train.
        network: the whole network, on any device; it stays as it is.
        frames: one micro-batch, uint8 [b, C, H, W].
        precision: of products and convolutions.
        compile: whether torch.compile makes the kernels.
    """
    on_cpu = world.device.type == "cpu"
    tried = candidates(
        "float32" if on_cpu and precision == "auto" else precision, "off" if on_cpu and compile == "auto" else compile
    )
    if len(tried) == 1:
        return tried[0]
    chosen: Acceleration | None = None
    if world.rank == 0:
        chosen = choose_acceleration(tried, copy.deepcopy(network).to(world.device), frames.to(world.device))
    agreed = world.from_first(chosen)
    assert agreed is not None
    return agreed
