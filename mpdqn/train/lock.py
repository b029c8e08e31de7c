"""`RunLock`: one process at a time trains in a run's folder. The kernel ends the lock with the process."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK = ".lock"
PATIENCE_S = 1.0


class FolderInUse(ValueError):
    """Another process trains in this folder."""


class RunLock:
    """The lock of the run in ``folder``, held while in the context.

    It is flock(2)'s, and so as good between hosts as the file system's: NFS from version 4 on.

    Raises:
        FolderInUse: from entering, if another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        patience = time.monotonic() + PATIENCE_S  # whoever only looks holds it for a moment
        while not _taken(self._descriptor, fcntl.LOCK_EX):
            if time.monotonic() > patience:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace")
                os.close(self._descriptor)
                raise FolderInUse(f"{self._folder} is being trained by {holder}; wait for it or end it first")
            time.sleep(0.05)
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._descriptor)


def in_use(folder: Path) -> bool:
    """Whether a process trains in ``folder``, as far as this host can see."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _taken(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    """Whether the lock was free and is had now, until ``descriptor`` is closed."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
