"""Frames in files against a dictionary of all frames, for any sizes, ends of episodes and times of checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpdqn.checkpoint.entries import RowsEntry
from mpdqn.checkpoint.rows import NewRows, check_rows, live_rows, load_rows
from mpdqn.replay import Shard

ENDS = st.sampled_from([0.0, 0.1, 0.5, 1.0])

same_always = settings(max_examples=80, deadline=None, derandomize=True, database=None)


class Play:
    """Steps of random frames in one shard, and what every frame was, by environment and position."""

    def __init__(self, shard: Shard, seed: int) -> None:
        self.shard = shard
        self.frames: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._written = [0] * shard.num_envs
        self._random = np.random.default_rng(seed)

    def step(self, ends: float) -> None:
        """One of every environment; each one's episode ends with probability ``ends``."""
        shard, random = self.shard, self._random
        size = (shard.num_envs, shard.stack * shard.frame_shape[0], *shard.frame_shape[1:])
        seen, then = (random.integers(256, size=size, dtype=np.uint8) for _ in range(2))
        ended = random.random(shard.num_envs) < ends
        cut_short = ended & (random.random(shard.num_envs) < 0.5)
        shard.append(
            observation=torch.from_numpy(seen),
            action=torch.from_numpy(random.integers(4, size=shard.num_envs)),
            reward=torch.from_numpy(random.random(shard.num_envs, dtype=np.float32)),
            terminated=torch.from_numpy(ended & ~cut_short),
            truncated=torch.from_numpy(cut_short),
            next_observation=torch.from_numpy(then),
        )
        for env in range(shard.num_envs):
            for picture in [seen[env], then[env]][: 2 if ended[env] else 1]:
                self.frames[env, self._written[env]] = picture[-shard.frame_shape[0] :].copy()
                self._written[env] += 1

    def live(self) -> dict[tuple[int, int], NDArray[np.uint8]]:
        """The frames that the ring still has."""
        oldest = [written - self.shard.length for written in self._written]
        return {(env, at): frame for (env, at), frame in self.frames.items() if at >= oldest[env]}


def assert_holds(shard: Shard, frames: dict[tuple[int, int], NDArray[np.uint8]]) -> None:
    """Each of ``frames``, by environment and position, is in the ring."""
    for (env, at), frame in frames.items():
        assert np.array_equal(shard.frames[env * shard.length + at % shard.length], frame), (env, at)


@st.composite
def makers(draw: st.DrawFn) -> Callable[[], Shard]:
    """Something that makes the same empty shard each time."""
    num_envs, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    stack, n_step = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return lambda: Shard(
        index=0,
        observation_shape=(stack, 5, 3),
        capacity=capacity,
        num_envs=num_envs,
        seed=0,
        stack=stack,
        n_step=n_step,
    )


def reloaded(make: Callable[[], Shard], shard: Shard, folder: Path, rows: tuple[RowsEntry, ...]) -> Shard:
    """A new shard with the state of ``shard``, its frames from ``rows``."""
    fresh = make()
    fresh.load_tensors(shard.tensors(frames=False))
    load_rows(folder, rows, fresh)
    return fresh


@same_always
@given(makers(), st.lists(st.integers(0, 30), min_size=1, max_size=6), ENDS, st.integers(0, 99))
def test_every_checkpoint_has_all_frames_of_the_ring_and_each_is_written_once(
    make: Callable[[], Shard], segments: list[int], ends: float, seed: int
) -> None:
    shard = make()
    play = Play(shard, seed)
    rows: tuple[RowsEntry, ...] = ()
    written: list[tuple[int, int]] = []
    expected: set[tuple[int, int]] = set()
    frame_bytes = int(np.prod(shard.frame_shape))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for checkpoint, steps in enumerate(segments):
            for _ in range(steps):
                play.step(ends)
            new = NewRows.since(shard, rows)
            rows = live_rows(rows, shard)
            if len(new):
                one = new.write(folder / f"{checkpoint}.rows")
                rows = (*rows, one)
                written += [
                    (e, p) for e, (a, b) in enumerate(zip(one.first, one.stop, strict=True)) for p in range(a, b)
                ]
                assert one.entry.bytes == len(new) * frame_bytes == (folder / one.file).stat().st_size
            expected |= play.live().keys()
            check_rows(folder, rows)
            assert_holds(reloaded(make, shard, folder, rows), play.live())
            # No file is kept for nothing.
            live = play.live().keys()
            assert all(
                any((e, p) in live for e, (a, b) in enumerate(zip(r.first, r.stop, strict=True)) for p in range(a, b))
                for r in rows
            )
    assert len(written) == len(set(written)), "a frame was written twice"
    assert set(written) == expected
    if all(2 * steps <= shard.length for steps in segments):  # nothing was overwritten between two checkpoints
        assert len(written) == shard.written.sum() == len(play.frames)


@same_always
@given(makers(), st.integers(0, 60), st.integers(0, 60), st.integers(0, 20), ENDS)
def test_what_further_steps_would_overwrite(
    make: Callable[[], Shard], before: int, since: int, steps: int, ends: float
) -> None:
    """Exactly: `overwritten_by` says yes if and only if frames change where every step ends an episode."""
    shard = make()
    play = Play(shard, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(before):
            play.step(ends)
        old = NewRows.since(shard, ())
        rows = (old.write(folder / "old.rows"),) if len(old) else ()
        for _ in range(since):
            play.step(ends)
        new = NewRows.since(shard, rows)
        told = new.overwritten_by(steps)
        at_once = new.write(folder / "at once.rows")
        for _ in range(steps):
            play.step(1.0)
        later = new.write(folder / "later.rows")
        assert told == (at_once.entry != later.entry)
