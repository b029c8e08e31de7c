"""Frames are written once, and put back where they were."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpdqn.checkpoint.entries import RowsEntry
from mpdqn.checkpoint.manifest import DamagedCheckpoint
from mpdqn.checkpoint.rows import NewRows, check_rows, live_rows, load_rows
from mpdqn.replay import Shard

ENVS, FRAME = 3, (1, 2, 2)


def make_shard(capacity: int = 60) -> Shard:
    return Shard(index=0, observation_shape=FRAME, capacity=capacity, num_envs=ENVS, seed=0, stack=1)


def append(shard: Shard, steps: int, choice: random.Random) -> None:
    for _ in range(steps):
        flags = torch.tensor([choice.random() < 0.1 for _ in range(ENVS)])
        shard.append(
            observation=torch.tensor(list(choice.randbytes(ENVS * 4)), dtype=torch.uint8).view(ENVS, *FRAME),
            action=torch.zeros(ENVS, dtype=torch.int64),
            reward=torch.zeros(ENVS),
            terminated=flags,
            truncated=torch.zeros(ENVS, dtype=torch.bool),
            next_observation=torch.zeros(ENVS, *FRAME, dtype=torch.uint8),
        )


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_is_written_once_and_comes_back(seed: int, tmp_path: Path) -> None:
    choice, shard = random.Random(seed), make_shard()
    rows: tuple[RowsEntry, ...] = ()
    count = 0
    for k in range(choice.randrange(1, 8)):
        append(shard, choice.choice([0, 1, 5, 15, 30]), choice)
        rows = live_rows(rows, shard)
        new = NewRows.since(shard, rows)
        if len(new):
            rows = (*rows, new.write(tmp_path / f"{k}.rows"))
            count += len(new)
    assert count <= shard.written.sum(), "some were overwritten before they could be written, none was written twice"
    check_rows(tmp_path, rows)
    other = make_shard()
    other.written[:] = shard.written
    load_rows(tmp_path, rows, other)
    for env in range(ENVS):
        newest = int(shard.written[env])
        for position in range(max(0, newest - shard.length), newest):
            row = env * shard.length + position % shard.length
            assert np.array_equal(other.frames[row], shard.frames[row])
    if len(rows) > 1:
        with pytest.raises(DamagedCheckpoint, match=r"are in no file|were written"):
            load_rows(tmp_path, rows[:-1] if seed % 2 else rows[1:], other)


def test_only_frames_that_would_be_overwritten_are_waited_for() -> None:
    shard = make_shard()
    append(shard, 10, random.Random(0))
    new = NewRows.since(shard, ())
    least = int(shard.length - shard.written.max()) // 2
    assert not new.overwritten_by(least)
    assert new.overwritten_by(least + 1)
    append(shard, 15, random.Random(1))
    assert NewRows.since(shard, ()).overwritten_by(1), "the ring is full: the oldest frame is the next to go"


def test_a_file_that_shrinks_while_it_is_read_is_damage(tmp_path: Path) -> None:
    """The rest of the ring was left as zeros: the return of ``readinto`` was not looked at."""
    shard = make_shard()
    append(shard, 10, random.Random(0))
    rows = (NewRows.since(shard, ()).write(tmp_path / "0.rows"),)
    check_rows(tmp_path, rows)
    with (tmp_path / "0.rows").open("r+b") as file:  # it goes on shrinking after it was found whole
        file.truncate(rows[0].entry.bytes - 1)
    other = make_shard()
    other.written[:] = shard.written
    with pytest.raises(DamagedCheckpoint, match=r"0\.rows ended while it was read: \d+ bytes came and \d+ were needed"):
        load_rows(tmp_path, rows, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": (0, 0), "stop": (5, 5)}, "of 2 environments, but shard 0 has 3 environments and 4 bytes in a row"),
        ({"stop": (99, 10, 10)}, "120 bytes, 119 rows of 3 environments"),
        ({"first": (10, 0, 0), "stop": (20, 10, 10)}, "begins at row 10 of environment 0"),
        ({"first": (0, 0, 10), "stop": (20, 10, 10)}, "has rows up to 20 of environment 0 of shard 0 but"),
    ],
)
def test_rows_that_do_not_fit_the_ring_are_damage(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    shard = make_shard()
    steps = random.Random(13)  # no episode ends: ten rows of each environment
    append(shard, 10, steps)
    assert shard.written.tolist() == [10, 10, 10]
    rows = NewRows.since(shard, ()).write(tmp_path / "0.rows")
    other = make_shard()
    other.written[:] = shard.written
    with pytest.raises(DamagedCheckpoint, match=message):
        load_rows(tmp_path, (replace(rows, **changes),), other)
