"""`PixelFormat`: a simulator's picture as one frame of a stack, with integer arithmetic only, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST = 84
"""Height and width to which larger pictures are reduced by default (Mnih et al. 2015)."""


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How a picture uint8 [H, W], [H, W, 1] or [H, W, 3] becomes a frame uint8 [C, h, w].

    ``grey``: luma of ITU-R 601, C = 1. ``size`` (h, w), by averaging areas; None keeps the size. ``crop``: the rows and
    columns (top, bottom, left, right) that are kept before that.
    """

    grey: bool = True
    size: tuple[int, int] | None = (LARGEST, LARGEST)
    crop: tuple[int, int, int, int] | None = None

    def frame_shape(self, picture: tuple[int, ...]) -> tuple[int, int, int]:
        """The (C, h, w) that a picture of the given shape becomes."""
        channels = 1 if self.grey or len(picture) == 2 else picture[2]
        if self.size:
            return channels, *self.size
        if self.crop:
            top, bottom, left, right = self.crop
            return channels, bottom - top, right - left
        return channels, picture[0], picture[1]

    def frame(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frame [C, h, w] of a ``picture``, in new memory."""
        if self.crop:
            top, bottom, left, right = self.crop
            picture = picture[top:bottom, left:right]
        if picture.ndim == 3 and picture.shape[2] == 1:
            picture = picture[:, :, 0]
        image = Image.fromarray(np.ascontiguousarray(picture))
        if self.grey and picture.ndim == 3:
            image = image.convert("L")
        if self.size and self.size != (image.height, image.width):
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BOX)
        frame = np.array(image)
        return frame[None] if frame.ndim == 2 else np.ascontiguousarray(frame.transpose(2, 0, 1))


def default_format(picture: tuple[int, ...]) -> PixelFormat:
    """Grey, and at most 84 × 84: what becomes of pictures that nobody gave a format for."""
    larger = picture[0] > LARGEST or picture[1] > LARGEST
    return PixelFormat(grey=True, size=(LARGEST, LARGEST) if larger else None)
