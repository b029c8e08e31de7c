"""Whose frames lie in a ``--replay-dir``. The run's folder names that directory, and may be another user's.

shard-0/owner            the run's id, written before its frames
shard-0/frames.memmap    deleted by the run that the mark names, and by no other
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mpdqn.checkpoint.entries import printable
from mpdqn.files import check_own_folder, open_itself, write_whole
from mpdqn.replay.rows import FRAMES, OWNER, occupied
from mpdqn.train.config import TrainJob


def owner(folder: Path) -> str:
    """Return the id of the run that has marked the shard's ``folder``; empty if none has."""
    try:
        descriptor = open_itself(folder / OWNER, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    with os.fdopen(descriptor, errors="replace") as file:
        return printable(file.read(100).strip())


def mark(job: TrainJob, shards: Iterable[int], run: str) -> None:
    """Mark the folders of ``shards``, which are made, as those of ``run``, before there are frames in them.

    Raises:
        ValueError: if a folder is a link, or holds anything else.
    """
    for folder in _folders(job, shards):
        _check_nothing_else(folder, run)
        folder.mkdir(parents=True, exist_ok=True)
        if owner(folder) != run:
            write_whole(folder / OWNER, f"{run}\n")


def check_owner(job: TrainJob, shards: Iterable[int], run: str) -> None:
    """Raise ValueError unless the mapped frames of all ``shards`` are those of ``run``, which may delete them.

    Frames of a version without marks are, if the user of this run has named the directory.
    """
    directory = job.config.replay_dir
    for folder in _folders(job, shards):
        check_own_folder(folder)
        if not _has_frames(folder):
            _check_nothing_else(folder, run)
            continue
        if (marked := owner(folder)) == run:
            continue
        if marked:
            raise ValueError(
                f"{folder} holds replay of run {marked[:8]} but {job.config.resume} holds run {run[:8]}; give another "
                "--replay-dir"
            )
        if not job.replay_dir_named:
            raise ValueError(
                f"{folder / FRAMES} has no mark of a run, and would be deleted to go on with run {run[:8]}; if it is "
                f"that run's, give --replay-dir {printable(str(directory))} again, else another --replay-dir"
            )


def clear(job: TrainJob, shards: Iterable[int], run: str) -> None:
    """Delete the mapped frames of ``shards``; ValueError as `check_owner`, and then nothing is deleted."""
    shards = list(shards)
    check_owner(job, shards, run)
    for folder in _folders(job, shards):
        (folder / FRAMES).unlink(missing_ok=True)


def _check_nothing_else(folder: Path, run: str) -> None:
    """Raise ValueError unless a shard's ``folder`` is missing, holds at most a mark, or is that of ``run``."""
    check_own_folder(folder)
    marked = owner(folder)
    if marked == run or not os.path.lexists(folder):
        return
    if occupied(folder) or not re.fullmatch("|[0-9a-f]{32}", marked):
        raise ValueError(f"{folder} already holds something else; give another --replay-dir or delete it")


def _folders(job: TrainJob, shards: Iterable[int]) -> list[Path]:
    directory = job.config.replay_dir
    return [] if directory is None else [directory / f"shard-{number}" for number in shards]


def _has_frames(folder: Path) -> bool:
    return os.path.lexists(folder / FRAMES)
