"""The first layer of every network: stored frames are uint8, networks compute in floats."""

from __future__ import annotations

import torch
from torch import nn


class Scale(nn.Module):
    """Frames in [0, 255] become numbers in [0, 1] (Mnih et al. 2015, Methods) in the network's dtype and memory format.

    Input: uint8 ``[B, C, H, W]``. Output: the same shape in the dtype, and in the memory format, that the network was
    last given: ``network.double()`` makes it float64, ``network.to(memory_format=torch.channels_last)`` makes it
    channels_last, whatever the layout of the frames.

    Raises:
        ValueError: if the input isn't uint8; frames that were scaled before would be scaled twice.
    """

    follower: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # `nn.Module.to` converts buffers as it converts weights: an empty-handed one remembers dtype and format for a
        # layer that has no weights. Four dimensions of 2, because the strides of smaller ones don't tell the format.
        # Its values are never read, so `to_empty` can't spoil them; it isn't in the state_dict.
        self.register_buffer("follower", torch.zeros(2, 2, 2, 2), persistent=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Scale uint8 ``[B, C, H, W]`` to floats of the same shape."""
        if frames.dtype is not torch.uint8:
            raise ValueError(
                f"the network takes uint8 frames and scales them itself but got {frames.dtype}; "
                "pass the frames as the environment gives them"
            )
        channels_last = self.follower.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # In this order, because torch converts dtype and layout together, or uint8 layouts, at half the speed on a CPU.
        return frames.to(self.follower.dtype).div_(255).contiguous(memory_format=memory_format)
