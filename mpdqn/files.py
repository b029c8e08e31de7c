"""Writing into folders that others may write to as well: never through a symbolic link.

whole file      a new file beside it ─▶ on the disk ─▶ takes the place of what has the name, a link too
further lines   the file itself is opened, and must be a plain one
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PART = ".part"
"""Suffix of a file that is being written."""


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Write a new file that takes the place of ``path`` at the end of the context; after an error nothing has changed.

    A process that is killed leaves the old file or the new one, and so does a power cut with ``sync``.
    """
    draft = path.with_name(path.name + PART)
    draft.unlink(missing_ok=True)
    try:
        with draft.open("xb") as file:  # a new file: in another user's folder the name might be a link
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, *, sync: bool = True) -> None:
    """Put ``text`` in the place of the file ``path``, as `replacing` does."""
    with replacing(path, sync=sync) as file:
        file.write(text.encode())


def open_to_append(path: Path) -> IO[str]:
    """Open the plain file ``path``, or a new one, to append text; ValueError as `check_plain`."""
    descriptor = open_itself(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK)
    return os.fdopen(descriptor, "a", encoding="utf-8", newline="")


def open_to_read(path: Path) -> io.BufferedReader:
    """Open the plain file ``path`` to read bytes; ValueError as `check_plain`, where a pipe would be waited for."""
    return os.fdopen(open_itself(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def check_plain(path: Path) -> None:
    """Raise ValueError if ``path`` is there and is not a plain file: a link, a pipe, a device or a folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.close(open_itself(path, os.O_RDONLY | os.O_NONBLOCK))


def check_own_folder(path: Path) -> None:
    """Raise ValueError if ``path`` is a symbolic link: what is written or deleted in that folder would be elsewhere."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link but must be a folder of its own; delete the link")


def open_itself(path: Path, flags: int, kind: str = "file") -> int:
    """Open the plain file ``path`` and return its descriptor.

    Raises:
        ValueError: if it is a symbolic link, or anything else than a plain file; ``kind`` says what it must be.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link but must be a {kind} of its own; delete the link") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a pipe that nobody reads, or a folder, opened to write
            raise ValueError(f"{path} is not a plain file but must be a {kind} of its own; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a plain file but must be a {kind} of its own; remove it")
    return descriptor
