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

from mpdqn.checkpoint.entries import (
    FileEntry,
    MalformedEntry,
    ShardRows,
    TensorEntry,
    check_array,
    check_count,
    check_list,
    check_mapping,
    check_name,
    check_text,
    printable,
)
from mpdqn.files import check_own_folder, open_to_read

FORMAT = 1
"""Raised whenever an older mpdqn could not read, or would misread, what is written."""

MANIFEST = "manifest.json"

_END_OF_TIME = 253_402_300_800  # the year 10,000, in seconds since 1970: the last that can be printed as a date


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not as it was written; an older one may be whole."""


class WrongCheckpoint(ValueError):
    """A checkpoint that is whole but cannot be gone on from here: of another version, run or network."""


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
            check_text("digest", digest := body.pop("digest"))
            written = body["format"]
            if _digest(body) != digest:
                raise DamagedCheckpoint(f"{where} is damaged: its digest is {_digest(body)[:12]}, not {digest[:12]}")
            check_count("format", written)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, DamagedCheckpoint):
                raise
            raise DamagedCheckpoint(f"{where} is damaged: {error!r}") from error
        if written != FORMAT:
            raise WrongCheckpoint(
                f"{where} has format {written}, written by mpdqn {printable(str(body.get('version')))[:60]}, and this "
                f"mpdqn reads format {FORMAT}; resume with that version"
            )
        if set(body) != {field.name for field in fields(cls)}:
            raise DamagedCheckpoint(f"{where} is damaged: it has the fields {sorted(body)}")
        try:
            manifest = cls(**body | _entries(body))
            manifest._check()
        except MalformedEntry as error:
            raise DamagedCheckpoint(f"{where} is damaged: {error}") from error
        return manifest

    def _check(self) -> None:
        """Raise MalformedEntry unless all fields are of their types and every tensor lies in a file with a digest."""
        for name in ("run", "layout", "version"):
            check_text(name, getattr(self, name))
        for name in ("round", "frames", "updates"):
            check_count(name, getattr(self, name))
        check_mapping("plan", self.plan)
        check_mapping("counters", self.counters)
        if type(self.written) not in (int, float) or not 0 <= self.written < _END_OF_TIME:
            raise MalformedEntry(f"written is {self.written!r}, not a time")
        for name in self.files:
            check_name(name)
        if MANIFEST in self.files:
            raise MalformedEntry(f"{MANIFEST} is listed among its own files")
        for name in (*self.parameters, *self.tensors):
            check_text("a tensor's name", name)
        for name, entry in self.tensors.items():
            size = self.files[entry.file].bytes if entry.file in self.files else None
            if size is None:
                raise MalformedEntry(f"tensor {name!r} lies in {entry.file}, which has no digest")
            if entry.offset + entry.bytes > size:
                raise MalformedEntry(
                    f"tensor {name!r} ends at byte {entry.offset + entry.bytes} of {entry.file}, which has {size}"
                )
        for number, rows in self.rows.items():
            rows.check_folder(number)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of the checkpoint in ``folder``; errors as `from_json`.

        Raises:
            DamagedCheckpoint: also if there is none, or it is of another folder.
        """
        path = folder / MANIFEST
        try:
            check_own_folder(folder)
            with open_to_read(path) as file:
                text = file.read().decode()
        except (OSError, ValueError) as error:  # a link or a pipe is a ValueError, as is text of another encoding
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
        manifest = cls.from_json(text, str(path))
        if folder.name != folder_name(manifest.round):
            raise DamagedCheckpoint(f"{folder} holds the checkpoint of round {manifest.round}: it was renamed")
        return manifest


def folder_name(rounds: int) -> str:
    """The folder of the checkpoint after so many rounds; names sort as their rounds do."""
    return f"{rounds:012d}"


def _entries(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a manifest that hold entries, from their JSON form."""
    parameters: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, value in check_mapping("parameters", body["parameters"]).items():
        pair = check_list(name, value)
        if len(pair) != 2:
            raise MalformedEntry(f"parameter {name!r} has {len(pair)} fields, not dtype and shape")
        dtype, shape = pair[0], check_list(name, pair[1])
        check_array(dtype, shape)
        parameters[name] = (dtype, shape)
    rows = {}
    for number, value in check_mapping("rows", body["rows"]).items():
        if not number.isdecimal() or len(number) > 9 or str(int(number)) != number:
            raise MalformedEntry(f"rows has the shard {number!r}, not a number")
        rows[int(number)] = ShardRows.from_dict(value)
    return {
        "parameters": parameters,
        "files": {n: FileEntry.from_dict(entry) for n, entry in check_mapping("files", body["files"]).items()},
        "tensors": {n: TensorEntry.from_dict(entry) for n, entry in check_mapping("tensors", body["tensors"]).items()},
        "rows": rows,
    }


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
