"""`open_video`: an mp4 of what an agent sees, frame by frame. It needs the extra ``video``."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mpdqn.extras import require_extra
from mpdqn.files import check_plain

FRAMES_PER_SECOND = 15  # 60 of the game, one in 4 of which is shown to the agent
_HEIGHT = 320  # pixels, about


class Video:
    """An mp4 under way; a context manager closes it. `open_video` makes one."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Append ``frame`` uint8 [c, H, W], enlarged without smoothing so that the agent's pixels are seen.

        c = 1 is grey and c = 3 RGB; of any other number, such as MinAtar's, each channel is shown as a grey of its own.
        """
        self._writer.append_data(picture(frame))

    def close(self) -> None:
        """Finish the file; a second call does nothing."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def open_video(path: Path, *, frames_per_second: float = FRAMES_PER_SECOND) -> Video:
    """Start the mp4 ``path``.

    Raises:
        ValueError: if the extra ``video`` is not installed, the name doesn't end in ``.mp4`` or is a link's.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"{path} is no name of an mp4; try {path.with_suffix('.mp4')}")
    check_plain(path)
    require_extra("video", "a video")  # imageio would miss ffmpeg only at the first frame
    import imageio.v2

    path.parent.mkdir(parents=True, exist_ok=True)
    # `picture` gives even sizes, which is all that the codec needs; imageio would resize to multiples of 16.
    return Video(imageio.v2.get_writer(path, fps=frames_per_second, macro_block_size=2, ffmpeg_log_level="error"))


def picture(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``frame`` uint8 [c, H, W] as RGB uint8 [H', W', 3], enlarged by one even factor to a height of about 320."""
    channels, height, _ = frame.shape
    if channels == 1:
        rgb = np.repeat(frame, 3, axis=0)
    elif channels == 3:
        rgb = frame
    else:
        greys = np.linspace(255 / channels, 255, channels).astype(np.uint8)
        rgb = np.repeat(((frame > 0) * greys[:, None, None]).max(axis=0, keepdims=True), 3, axis=0)
    factor = 2 * max(1, round(_HEIGHT / 2 / height))
    large: NDArray[np.uint8] = rgb.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)
    return large
