"""The entries of a manifest: files with digests, tensors in them, and files of frames.

Each entry checks its own fields, because a manifest comes from a disk that others may write to: a name stays inside the
folder that it belongs to, sizes and shapes fit each other, and a dtype is one of those that checkpoints hold.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

ITEM_BYTES: Mapping[str, int] = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}
"""The dtypes that a checkpoint may hold, with the bytes of one element."""


class MalformedEntry(ValueError):
    """An entry whose fields are not what a checkpoint writes."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file's size in bytes and the SHA-256 of its content in hexadecimal digits."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_count("bytes", self.bytes)
        check_text("sha256", self.sha256)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the entry that `dataclasses.asdict` turned into ``data``."""
        return cls(**check_keys(data, "bytes", "sha256"))


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor's elements lie, in order and without gaps: ``bytes`` bytes of ``file`` from ``offset`` on."""

    file: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_name(self.file)
        check_count("offset", self.offset)
        check_count("bytes", self.bytes)
        check_array(self.dtype, self.shape)
        if self.bytes != (needed := math.prod(self.shape) * ITEM_BYTES[self.dtype]):
            raise MalformedEntry(f"{self.dtype} {list(self.shape)} has {needed} bytes, not {self.bytes}")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the entry that `dataclasses.asdict` turned into ``data``."""
        fields = check_keys(data, "file", "offset", "bytes", "dtype", "shape")
        return cls(**fields | {"shape": check_list("shape", fields["shape"])})


@dataclass(frozen=True, kw_only=True)
class RowsEntry:
    """A file of a shard's frames: for each of its environments the rows of positions ``first`` up to ``stop``.

    ``file`` is relative to the folder of rows, see `mpdqn.checkpoint.folder`; ``entry`` says how it must be.
    """

    file: str
    first: tuple[int, ...]
    stop: tuple[int, ...]
    entry: FileEntry

    def __post_init__(self) -> None:
        check_name(self.file)
        for position in (*self.first, *self.stop):
            check_count("position", position)
        if len(self.first) != len(self.stop) or any(a > b for a, b in zip(self.first, self.stop, strict=True)):
            raise MalformedEntry(f"{self.file} has rows from {list(self.first)} up to {list(self.stop)}")

    @property
    def num_rows(self) -> int:
        """Rows of all environments together."""
        return sum(self.stop) - sum(self.first)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the entry that `dataclasses.asdict` turned into ``data``."""
        fields = check_keys(data, "file", "first", "stop", "entry")
        return cls(
            file=fields["file"],
            first=check_list("first", fields["first"]),
            stop=check_list("stop", fields["stop"]),
            entry=FileEntry.from_dict(fields["entry"]),
        )


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """The frames of one shard: all files of them, oldest first, in ``folder`` on ``host``."""

    host: str
    folder: str
    files: tuple[RowsEntry, ...]

    def __post_init__(self) -> None:
        check_text("host", self.host)
        if not isinstance(self.folder, str) or "\0" in self.folder:  # any other path may be a user's own
            raise MalformedEntry(f"folder is {_short(self.folder)}, not a path")

    def check_folder(self, number: int) -> None:
        """Raise MalformedEntry unless ``folder`` is one that the frames of shard ``number`` can have been written to.

        It may lie outside the run's folder, where ``--replay-dir`` was, but never at a place of another kind.
        """
        path = PurePosixPath(self.folder)
        kept = path.parent.name == "rows" or path.parent.name.startswith("rows-of-")
        if not path.is_absolute() or ".." in path.parts or path.name != f"shard-{number}" or not kept:
            raise MalformedEntry(f"{self.folder!r} is not a folder of the frames of shard {number}")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the entry that `dataclasses.asdict` turned into ``data``."""
        fields = check_keys(data, "host", "folder", "files")
        files = check_list("files", fields["files"])
        return cls(host=fields["host"], folder=fields["folder"], files=tuple(RowsEntry.from_dict(f) for f in files))


def check_keys(data: Any, *names: str) -> dict[str, Any]:
    """Return ``data`` if it is a mapping with exactly these keys."""
    if not isinstance(data, dict) or set(data) != set(names):
        raise MalformedEntry(f"{_short(data)} does not have the fields {', '.join(names)}")
    return data


def check_mapping(what: str, value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a mapping."""
    if not isinstance(value, dict):
        raise MalformedEntry(f"{what} is {_short(value)}, not a mapping")
    return value


def check_list(what: str, value: Any) -> tuple[Any, ...]:
    """Return the elements of ``value`` if it is a list."""
    if not isinstance(value, list):
        raise MalformedEntry(f"{what} is {_short(value)}, not a list")
    return tuple(value)


def check_count(what: str, value: Any) -> None:
    """Raise MalformedEntry unless ``value`` is an integer from 0 to 2⁶³ − 1."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise MalformedEntry(f"{what} is {_short(value)}, not a count")


def check_text(what: str, value: Any) -> None:
    """Raise MalformedEntry unless ``value`` is printable text of one line."""
    if not isinstance(value, str) or printable(value) != value:
        raise MalformedEntry(f"{what} is {_short(value)}, not a line of text")


def printable(text: str) -> str:
    """Return ``text`` with every character that is not printable, such as an escape or a line end, written out.

    Every blank counts as printable, as the wide one of Japanese and Chinese names.
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def check_name(value: Any) -> None:
    """Raise MalformedEntry unless ``value`` is the plain name of a file: no path, and none of the special names."""
    check_text("file", value)
    if value in ("", ".", "..") or "/" in value:
        raise MalformedEntry(f"file is {_short(value)}, which is not a name inside the folder")


def check_array(dtype: Any, shape: tuple[Any, ...]) -> None:
    """Raise MalformedEntry unless these are a dtype of checkpoints and a shape."""
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise MalformedEntry(f"dtype is {_short(dtype)}; a checkpoint holds {', '.join(ITEM_BYTES)}")
    for size in shape:
        check_count("size", size)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
