"""`Manifest`: all that a checkpoint holds, in one JSON file written last.

    {"format": 1, "run": …, "round": 1200, …, "files": {"rank-0.bin": {"bytes": …, "sha256": …}}, …, "digest": sha256}

Its own digest tells a damaged manifest, its files' digests every other damage, ``run`` and ``parameters`` a checkpoint
of something else, and ``format`` one of a later version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

FORMAT = 1
"""Raised whenever an older mpdqn could not read, or would misread, what is written."""

MANIFEST = "manifest.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not as it was written; an older one may be whole."""


class WrongCheckpoint(ValueError):
    """A checkpoint that is whole but cannot be gone on from here: of another version, run or network."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file's size in bytes and the SHA-256 of its content in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor's elements lie, in order and without gaps: ``bytes`` bytes of ``file`` from ``offset`` on."""

    file: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RowsEntry:
    """A file of a shard's frames: for each of its environments the rows of positions ``first`` up to ``stop``.

    ``file`` is relative to the folder of rows, see `mpdqn.checkpoint.folder`; ``entry`` says how it must be.
    """

    file: str
    first: tuple[int, ...]
    stop: tuple[int, ...]
    entry: FileEntry


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """The frames of one shard: all files of them, oldest first, in ``folder`` on ``host``."""

    host: str
    folder: str
    files: tuple[RowsEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one checkpoint holds.

    ``run`` names the run, ``round`` how many rounds were done, ``plan`` and ``layout`` how they were computed.
    ``parameters`` dtype and shape of each of the network's; ``files`` in the checkpoint's folder; ``tensors`` by name;
    ``rows`` the frames by shard; ``counters`` small numbers of the training loop. ``written`` is the time in seconds
    since 1970.
    """

    run: str
    round: int
    frames: int
    updates: int
    layout: str
    plan: Mapping[str, Any]
    parameters: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    rows: Mapping[int, ShardRows]
    counters: Mapping[str, Any]
    written: float
    version: str
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Bytes of the files in its own folder."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def num_row_bytes(self) -> int:
        """Bytes of the frames, most of which other checkpoints share."""
        return sum(rows.entry.bytes for shard in self.rows.values() for rows in shard.files)

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back to an equal value."""
        body = json.loads(json.dumps(asdict(self)))  # as it will be read: shard 10 sorts before "9", not before 9
        return json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """The manifest that `to_json` wrote; ``where`` is its path, for errors.

        Raises:
            DamagedCheckpoint: if it is not as it was written.
            WrongCheckpoint: if a later mpdqn wrote it.
        """
        try:
            body = json.loads(text)
            digest = body.pop("digest")
            written = body["format"]
            if _digest(body) != digest:
                raise DamagedCheckpoint(f"{where} is damaged: its digest is {_digest(body)[:12]}, not {digest[:12]}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DamagedCheckpoint):
                raise
            raise DamagedCheckpoint(f"{where} is damaged: {error!r}") from error
        if written != FORMAT:
            raise WrongCheckpoint(
                f"{where} has format {written}, written by mpdqn {body.get('version')}, and this mpdqn reads format "
                f"{FORMAT}; resume with that version"
            )
        if set(body) != {field.name for field in fields(cls)}:
            raise DamagedCheckpoint(f"{where} is damaged: it has the fields {sorted(body)}")
        return cls(
            **body
            | {
                "parameters": {name: (dtype, tuple(shape)) for name, (dtype, shape) in body["parameters"].items()},
                "files": {name: FileEntry(**entry) for name, entry in body["files"].items()},
                "tensors": {
                    name: TensorEntry(**entry | {"shape": tuple(entry["shape"])})
                    for name, entry in body["tensors"].items()
                },
                "rows": {int(number): _shard_rows(entry) for number, entry in body["rows"].items()},
            }
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of the checkpoint in ``folder``; errors as `from_json`.

        Raises:
            DamagedCheckpoint: also if there is none, or it is of another folder.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
        manifest = cls.from_json(text, str(path))
        if folder.name != folder_name(manifest.round):
            raise DamagedCheckpoint(f"{folder} holds the checkpoint of round {manifest.round}: it was renamed")
        return manifest


def folder_name(rounds: int) -> str:
    """The folder of the checkpoint after so many rounds; names sort as their rounds do."""
    return f"{rounds:012d}"


def _shard_rows(data: dict[str, Any]) -> ShardRows:
    files = tuple(
        RowsEntry(
            file=rows["file"],
            first=tuple(rows["first"]),
            stop=tuple(rows["stop"]),
            entry=FileEntry(**rows["entry"]),
        )
        for rows in data["files"]
    )
    return ShardRows(host=data["host"], folder=data["folder"], files=files)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
