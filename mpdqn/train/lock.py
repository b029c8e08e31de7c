"""Locks that the kernel ends with the process that holds them: one process at a time trains in a run's folder, and one
rank at a time has the replay of a shard in a ``--replay-dir``.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from mpdqn.checkpoint.entries import printable
from mpdqn.files import open_itself

LOCK = ".lock"
PATIENCE_S = 1.0


class FolderInUse(ValueError):
    """Another process trains in this folder."""


class FolderLock:
    """An exclusive lock on the file ``path``, held while in the context.

    It is flock(2)'s, and so as good between hosts as the file system's: NFS from version 4 on.

    Args:
        path: of the lock file, which is made if there is none, and stays.
        used: how the error begins that is raised while another process holds the lock, such as "/runs/a is in use by".
        advice: how it ends.

    Raises:
        FolderInUse: from entering, if another process has it.
        ValueError: from entering, if ``path`` is a symbolic link: the file that it points to would be overwritten.
    """

    def __init__(self, path: Path, used: str, advice: str) -> None:
        self._path, self._used, self._advice = path, used, advice

    def __enter__(self) -> Self:
        self._descriptor = _open(self._path, os.O_RDWR | os.O_CREAT)
        patience = time.monotonic() + PATIENCE_S  # whoever only looks holds it for a moment
        while not _taken(self._descriptor, fcntl.LOCK_EX):
            if time.monotonic() > patience:
                holder = printable(os.pread(self._descriptor, 200, 0).decode(errors="replace"))
                os.close(self._descriptor)
                raise FolderInUse(f"{self._used} {holder}; {self._advice}")
            time.sleep(0.05)
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._descriptor)


class RunLock(FolderLock):
    """The lock of the run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / LOCK, f"{folder} is being trained by", "wait for it or end it first")


class ReplayLock(FolderLock):
    """The lock of shard ``number`` in the folder of ``--replay-dir``.

    One for each shard, since each rank has its own shards there, on one host or on several.
    """

    def __init__(self, directory: Path, number: int | str) -> None:
        super().__init__(
            directory / f"{LOCK}-shard-{number}",
            f"--replay-dir {directory} has the replay of a live run, shard {number} of",
            "wait for it, end it, or choose another --replay-dir",
        )


def in_use(folder: Path) -> bool:
    """Whether a process trains in ``folder``, as far as this host can see; ValueError if its lock is a link."""
    try:
        descriptor = _open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _taken(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def check_replay_unused(directory: Path) -> None:
    """Raise FolderInUse if a live run has replay in the folder of ``--replay-dir``, as far as this host can see."""
    for path in sorted(directory.glob(f"{LOCK}-shard-*")):
        with ReplayLock(directory, path.name.removeprefix(f"{LOCK}-shard-")):
            pass


def _open(path: Path, flags: int) -> int:
    """Open the lock file ``path`` itself; ValueError if it is a symbolic link or no plain file."""
    return open_itself(path, flags | os.O_NONBLOCK, "lock file")


def _taken(descriptor: int, kind: int) -> bool:
    """Whether the lock was free and is had now, until ``descriptor`` is closed."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
