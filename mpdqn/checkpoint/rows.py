"""The frames of a shard, each written once: a file of rows holds those of between two checkpoints.

    ring of L rows          written 0 ………… 100 ………… 200 ………… 300       L = 150
    checkpoint at 100       [0, 100)
    checkpoint at 200       [0, 100) [100, 200)
    checkpoint at 300                [100, 200) [200, 300)              the ring has overwritten what is before 150

Frames are most of a checkpoint (7,056 of some 7,090 bytes of an Atari transition) and never change; what else a row
has is small, changes with priorities, and is written anew each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpdqn.checkpoint.entries import RowsEntry
from mpdqn.checkpoint.files import DigestedFile, Pace, check_file
from mpdqn.checkpoint.manifest import DamagedCheckpoint
from mpdqn.files import open_to_read
from mpdqn.replay import Shard


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows of ``shard`` to be written, positions ``first`` up to ``stop`` of each environment's ring.

    They are read from the ring itself while they are written, so that nothing is copied: `overwritten_by` tells when
    that must be waited for.
    """

    shard: Shard
    first: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def since(cls, shard: Shard, rows: Sequence[RowsEntry]) -> NewRows:
        """What is in the ring and not in the files ``rows``."""
        stop = shard.written.tolist()
        before = rows[-1].stop if rows else (0,) * shard.num_envs
        first = [max(old, new - shard.length) for old, new in zip(before, stop, strict=True)]
        return cls(shard=shard, first=tuple(first), stop=tuple(stop))

    def __len__(self) -> int:
        return sum(self.stop) - sum(self.first)

    def overwritten_by(self, steps: int) -> bool:
        """Whether so many more steps of every environment could overwrite a row of these."""
        # A step that ends an episode takes two rows.
        heads = (self.shard.written + 2 * steps).tolist()
        return any(
            stop > first and head > first + self.shard.length
            for first, stop, head in zip(self.first, self.stop, heads, strict=True)
        )

    def write(self, path: Path, pace: Pace | None = None) -> RowsEntry:
        """Write them to the file ``path``; OSError leaves none."""
        try:
            with DigestedFile(path, pace) as file:
                for part in self._parts():
                    file.write(part.reshape(-1).data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return RowsEntry(file=path.name, first=self.first, stop=self.stop, entry=file.entry)

    def _parts(self) -> Iterator[NDArray[np.uint8]]:
        for env, (first, stop) in enumerate(zip(self.first, self.stop, strict=True)):
            yield from _ring_parts(self.shard, env, first, stop)


def live_rows(rows: Sequence[RowsEntry], shard: Shard) -> tuple[RowsEntry, ...]:
    """Those of the files ``rows`` that hold a row which is still in the ring."""
    oldest = (shard.written - shard.length).tolist()
    return tuple(r for r in rows if any(stop > old for stop, old in zip(r.stop, oldest, strict=True)))


def check_rows(folder: Path, rows: Sequence[RowsEntry]) -> None:
    """Raise DamagedCheckpoint unless every file of ``rows`` is in ``folder`` as it was written."""
    for one in rows:
        check_file(folder / one.file, one.entry)


def load_rows(folder: Path, rows: Sequence[RowsEntry], shard: Shard) -> None:
    """Put the frames of ``rows``, oldest first, in the ring of ``shard``, whose cursors are as they were.

    Raises:
        DamagedCheckpoint: if they are not all that the ring held.
    """
    covered = np.maximum(shard.written - shard.length, 0)
    row_bytes = shard.frames[0].nbytes
    for one in rows:
        path = folder / one.file
        if len(one.first) != shard.num_envs or one.entry.bytes != one.num_rows * row_bytes:
            raise DamagedCheckpoint(
                f"{path} holds {one.entry.bytes} bytes, {one.num_rows} rows of {len(one.first)} environments, but "
                f"shard {shard.index} has {shard.num_envs} environments and {row_bytes} bytes in a row"
            )
        with open_to_read(path) as file:
            for env, (first, stop) in enumerate(zip(one.first, one.stop, strict=True)):
                if first > covered[env]:
                    raise DamagedCheckpoint(
                        f"{path} begins at row {first} of environment {env} of shard {shard.index} but "
                        f"rows {covered[env]} to {first - 1} are in no file"
                    )
                if stop > shard.written[env]:
                    raise DamagedCheckpoint(
                        f"{path} has rows up to {stop} of environment {env} of shard {shard.index} but "
                        f"{shard.written[env]} were written"
                    )
                covered[env] = max(covered[env], stop)
                for part in _ring_parts(shard, env, first, stop):
                    # The file was checked before, but another process may have cut it since.
                    if (count := file.readinto(part.reshape(-1).data)) != part.nbytes:
                        raise DamagedCheckpoint(
                            f"{path} ended while it was read: {count} bytes came and {part.nbytes} were needed"
                        )
    if (covered < shard.written).any():
        raise DamagedCheckpoint(
            f"the files of shard {shard.index} in {folder} hold rows up to {covered.tolist()} but "
            f"{shard.written.tolist()} were written"
        )


def _ring_parts(shard: Shard, env: int, first: int, stop: int) -> Iterator[NDArray[np.uint8]]:
    """Views of the ring's rows of positions ``first`` up to ``stop``, at most two rounds of it, in order."""
    while first < stop:
        place = first % shard.length
        count = min(stop - first, shard.length - place)
        begin = env * shard.length + place
        yield shard.frames[begin : begin + count]
        first += count
