"""Where the rows of a ring live: fields and frames in memory, or the frames in a file whose space is reserved first."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import MemoryMappedTensor
from torch import Tensor

from mpdqn.files import PART

FRAMES = "frames.memmap"
"""The file of a shard's folder."""

OWNER = "owner"
"""Beside it, a file that may be there before it: whose it is, see `mpdqn.train.mapped`."""


def frame_rows(shape: Sequence[int], directory: Path | None) -> Tensor:
    """Zeros of ``shape``, uint8: in memory, or in the file `FRAMES` of ``directory``, which `reserve` made.

    In memory, pages are mapped and not touched (`torch.zeros` touches every one): memory fills as the ring does. Huge
    pages would make a batch 10–15 % cheaper to read, but their first touch cost 22 µs a transition where this measured.
    """
    if directory is not None:
        file: Tensor = MemoryMappedTensor.from_filename(directory / FRAMES, torch.uint8, torch.Size(shape))
        return file
    pages = mmap.mmap(-1, torch.Size(shape).numel(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(*shape)


def field_rows(rows: int, action_shape: tuple[int, ...]) -> tuple[NDArray[Any], dict[str, Tensor]]:
    """What ``rows`` rows hold beside their frames: as records, which one read collects, and field by field.

    Both are views of the same memory; a record has 24 bytes, and 8 more for each further dimension of an action.
    """
    numbers = (("action", np.int64, action_shape), ("reward", np.float32), ("step", np.int32), ("td_error", np.float32))
    record = np.dtype([*numbers, ("terminated", np.bool_), ("truncated", np.bool_)], align=True)
    records = np.zeros(rows, record)
    assert record.names is not None
    return records, {name: torch.from_numpy(records[name]) for name in record.names}


def reserve(sizes: Mapping[Path, int]) -> None:
    """Make each folder of ``sizes`` and in it a file `FRAMES` of so many bytes, whose blocks are really its own.

    A sparse file would do as well until the disk is full: then the next write to the mapping kills the process with
    SIGBUS. Nothing but a mark is left behind when an error is raised.

    Raises:
        FileExistsError: if a folder holds anything already but its mark.
        OSError: if there is too little space for all of them.
    """
    for folder in sizes:
        if folder.exists() and occupied(folder):
            raise FileExistsError(f"{folder} already holds a replay buffer; choose another directory or delete it")
    made: list[Path] = []
    try:
        for folder in sizes:
            made += [parent for parent in reversed((folder, *folder.parents)) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(next(iter(sizes))).free if sizes else 0
        if sum(sizes.values()) > free:
            raise full(sum(sizes.values()), free, next(iter(sizes)).parent)
        for folder, size in sizes.items():
            with (folder / FRAMES).open("xb") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:  # others write there too, or a quota says so
                    raise full(sum(sizes.values()), shutil.disk_usage(folder).free, folder.parent) from error
    except OSError:
        for folder in sizes:
            (folder / FRAMES).unlink(missing_ok=True)
        for folder in reversed(made):
            folder.rmdir()
        raise


def occupied(folder: Path) -> bool:
    """Return whether the existing ``folder`` of a shard is no folder, or holds anything but its mark."""
    return not folder.is_dir() or any(path.name not in (OWNER, OWNER + PART) for path in folder.iterdir())


def full(needed: int, free: int, where: Path) -> OSError:
    """What to raise where ``needed`` bytes of frames do not go into the ``free`` bytes of folder ``where``."""
    return OSError(
        f"replay needs {needed} bytes ({needed / 2**30:.2f} GiB) in {where} but {free} bytes ({free / 2**30:.2f} GiB) "
        f"are free; make room, choose another directory, or lower the capacity to {free / needed:.0%} of what it is"
    )
