"""Videos of what an agent sees."""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from mpdqn.video import open_video, picture


def test_an_mp4_that_can_be_read_back(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    path = tmp_path / "videos" / "episode.mp4"
    frames = [np.full((1, 84, 84), level, dtype=np.uint8) for level in (0, 120, 240)]
    with open_video(path) as video:
        for frame in frames:
            video.add(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # imageio's reader leaves pipes of its ffmpeg to the collector
        with imageio.get_reader(path) as reader:
            assert reader.get_meta_data()["fps"] == 15
            read = [reader.get_data(i) for i in range(reader.count_frames())]
        del reader
        gc.collect()
    assert [image.shape for image in read] == [(336, 336, 3)] * 3
    assert [image.mean() for image in read] == [pytest.approx(level, abs=6) for level in (0, 120, 240)]


def test_a_name_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "episode.mp4").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"episode\.mp4 is a symbolic link but must be a file of its own; delete the"):
        open_video(tmp_path / "episode.mp4")
    assert (tmp_path / "precious").read_text() == "kept"


def test_pixels_are_enlarged_not_smoothed() -> None:
    frame = np.array([[[0, 255], [7, 9]]], dtype=np.uint8)
    image = picture(frame)
    assert image.shape == (320, 320, 3)
    assert {tuple(pixel) for pixel in image.reshape(-1, 3)} == {(v, v, v) for v in (0, 255, 7, 9)}
    assert (image[:160, 160:] == 255).all()


def test_channels() -> None:
    colour = np.stack([np.full((96, 96), v, dtype=np.uint8) for v in (1, 2, 3)])
    assert (picture(colour)[0, 0] == (1, 2, 3)).all()
    objects = np.eye(4, dtype=np.uint8).reshape(4, 2, 2)  # MinAtar: one object a channel
    assert len(np.unique(picture(objects))) == 4


@pytest.mark.parametrize("package", ["imageio", "imageio_ffmpeg"])
def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'mpdqn\[video\]'"):
        open_video(tmp_path / "episode.mp4")


def test_another_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"try .*episode\.mp4"):
        open_video(tmp_path / "episode.gif")
