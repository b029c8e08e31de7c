"""Frames on disk: the same replay, in files whose space is there before the first transition."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch
from tensordict import MemoryMappedTensor

from mpdqn.replay import VirtualShards, rows
from mpdqn.replay.rows import FRAMES, OWNER, reserve
from tests.replay.test_shards import assert_equal, make


def test_frames_on_disk_are_those_in_memory(tmp_path):
    disk, memory = make(directory=tmp_path / "replay"), make()
    assert sorted(folder.name for folder in (tmp_path / "replay").iterdir()) == [f"shard-{v}" for v in range(4)]
    for update in range(3):
        assert_equal(disk.sample(16, update), memory.sample(16, update))
    assert isinstance(disk[0].storage.get(slice(None))["frame"], MemoryMappedTensor)
    file = tmp_path / "replay" / "shard-2" / FRAMES
    state = disk.state()["2.frame"]
    assert file.read_bytes() == bytes(state.numpy())
    assert file.stat().st_blocks * 512 >= file.stat().st_size == state.numel(), "the file is sparse"


def test_a_folder_that_holds_a_buffer_is_refused(tmp_path):
    make((0, 1), directory=tmp_path)
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(tmp_path))}/shard-1 already holds a replay buffer"):
        make((1, 2), directory=tmp_path)
    assert not (tmp_path / "shard-2").exists()
    make((2, 3), directory=tmp_path)  # another process's part


def test_a_folder_that_is_only_marked_is_free(tmp_path):
    (tmp_path / "shard-1").mkdir()
    for name in (OWNER, f"{OWNER}.part"):
        (tmp_path / "shard-1" / name).touch()
    make((1,), directory=tmp_path)
    assert (tmp_path / "shard-1" / FRAMES).stat().st_size


def test_too_large_a_buffer_is_refused_at_once_and_leaves_nothing(tmp_path):
    directory = tmp_path / "a" / "b"
    with pytest.raises(
        OSError, match=r"replay needs \d+ bytes \(\d+\.\d\d GiB\) in .*/a/b but \d+ bytes .* are free"
    ) as e:
        VirtualShards(
            observation_shape=(4, 84, 84), num_shards=2, capacity=10**12, envs_per_shard=1, seed=0, directory=directory
        )
    assert "lower the capacity to 0%" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_space_that_is_gone_when_it_is_reserved_is_reported_alike(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="replay needs 20 bytes"):
        reserve({tmp_path / "x" / "0": 10, tmp_path / "x" / "1": 10})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_later_does_not_matter(small_disk):
    """Without reserved blocks the next write to the mapping would end the process with SIGBUS."""

    def build(capacity):
        return VirtualShards(
            observation_shape=(1, 84, 84),
            num_shards=1,
            capacity=capacity,
            envs_per_shard=1,
            seed=0,
            stack=1,
            directory=small_disk / "replay",
        )

    with pytest.raises(OSError, match=r"1\.35 GiB|needs 14119056 bytes .* but 1048576 bytes"):
        build(2000)
    shards = build(100)
    with (small_disk / "other").open("wb", buffering=0) as other:
        with pytest.raises(OSError, match="No space left"):
            os.posix_fallocate(other.fileno(), 0, 1 << 20)
        while os.statvfs(small_disk).f_bavail:
            other.write(bytes(4096))
    nothing = torch.zeros(1)
    for t in range(150):
        frame = torch.full((1, 1, 84, 84), t, dtype=torch.uint8)
        shards.append(
            observation=frame,
            action=nothing,
            reward=nothing,
            terminated=nothing.bool(),
            truncated=nothing.bool(),
            next_observation=frame + 1,
        )
    batch = shards.sample(32, 0)
    assert torch.equal(batch.obs.flatten(1)[:, 0].long(), batch.index)
    assert torch.equal(batch.next_obs.flatten(1)[:, 0].long(), batch.index + 1)
