"""Files whose digest is taken as they are written, and told again from what lies on the disk."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpdqn.checkpoint.entries import FileEntry
from mpdqn.checkpoint.manifest import DamagedCheckpoint
from mpdqn.files import open_to_read

BLOCK = 1 << 20
"""Bytes at a time: neither hashing nor writing holds Python's lock meanwhile, and after each a writer may rest."""


class Pace:
    """How much of the time a writer computes: ``share`` of it, and all of it after `hurry`.

    Where every core trains, each second of another thread costs the step about a second, as its threads wait for each
    other; a low priority alone does not help, since a thread that slept is let in at once.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._share, self._hurry = share, threading.Event()

    def hurry(self) -> None:
        """Somebody waits."""
        self._hurry.set()

    def rest(self, worked_s: float) -> None:
        """Rest from ``worked_s`` seconds of computing."""
        if self._share < 1:
            self._hurry.wait(worked_s * (1 / self._share - 1))


class DigestedFile:
    """A new file under way; a context manager, which has it on the disk at the end."""

    def __init__(self, path: Path, pace: Pace | None = None) -> None:
        self._path, self._hash, self.size = path, hashlib.sha256(), 0
        self._pace = pace or Pace()

    def write(self, data: memoryview) -> None:
        """Append ``data``, of bytes."""
        for begin in range(0, len(data), BLOCK):
            block, start = data[begin : begin + BLOCK], time.thread_time()
            self._hash.update(block)
            self._file.write(block)
            self._pace.rest(time.thread_time() - start)
        self.size += len(data)

    @property
    def entry(self) -> FileEntry:
        """Of what was written so far."""
        return FileEntry(bytes=self.size, sha256=self._hash.hexdigest())

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)  # of a draft that was killed, or a link
        self._file: Any = self._path.open("xb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def check_file(path: Path, entry: FileEntry) -> None:
    """Raise DamagedCheckpoint unless the file is a plain one and as it was written."""
    try:
        with open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry.bytes else ""
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a link, a pipe
        raise DamagedCheckpoint(str(error)) from error
    if size != entry.bytes:
        raise DamagedCheckpoint(f"{path} is damaged: it has {size} bytes and was written with {entry.bytes}")
    if digest != entry.sha256:
        raise DamagedCheckpoint(f"{path} is damaged: its digest is {digest[:12]}, not {entry.sha256[:12]}")


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
