"""A manifest is read back as it was written, or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpdqn.checkpoint.entries import FileEntry, RowsEntry, ShardRows, TensorEntry
from mpdqn.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    WrongCheckpoint,
    _digest,
    folder_name,
)


def example(num_shards: int = 12) -> Manifest:
    entry = FileEntry(bytes=8, sha256="ab" * 32)
    rows = RowsEntry(file="000000000007.rows", first=(0, 3), stop=(4, 7), entry=entry)
    return Manifest(
        run="1f",
        round=7,
        frames=56,
        updates=3,
        layout="dp2",
        plan={"placement": [[0, 1]]},
        parameters={"1.weight": ("float32", (4, 3)), "1.bias": ("float32", ())},
        files={"rank-0.bin": entry},
        tensors={"online.1.weight": TensorEntry(file="rank-0.bin", offset=0, bytes=8, dtype="float32", shape=(2,))},
        # Ten shards and more: as numbers they sort otherwise than as the names that JSON makes of them.
        rows={
            v: ShardRows(host="here", folder=f"/run/checkpoints/rows/shard-{v}", files=(rows,))
            for v in range(num_shards)
        },
        counters={"seconds": 0.1, "replay_lost": []},
        written=1.5,
        version="0",
    )


def written(folder: Path, text: str) -> Path:
    place = folder / folder_name(7)
    place.mkdir(parents=True)
    (place / MANIFEST).write_text(text)
    return place


def test_it_is_read_back_as_it_was(tmp_path: Path) -> None:
    manifest = example()
    assert Manifest.read(written(tmp_path, manifest.to_json())) == manifest
    assert (manifest.num_bytes, manifest.num_row_bytes) == (8, 12 * 8)


def test_every_other_text_is_damaged(tmp_path: Path) -> None:
    text = example(1).to_json()
    for at in range(0, len(text), 7):
        other = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        with pytest.raises((DamagedCheckpoint, WrongCheckpoint)):
            Manifest.from_json(other, "here")
    for broken in ("", "{}", "[]", "null", text[: len(text) // 2]):
        with pytest.raises(DamagedCheckpoint, match="here is damaged"):
            Manifest.from_json(broken, "here")
    body = json.loads(text)
    with pytest.raises(DamagedCheckpoint, match="digest"):
        Manifest.from_json(json.dumps(body | {"frames": 57}), "here")


def test_a_renamed_folder_and_a_missing_manifest(tmp_path: Path) -> None:
    folder = written(tmp_path, example().to_json())
    with pytest.raises(DamagedCheckpoint, match="holds the checkpoint of round 7: it was renamed"):
        Manifest.read(folder.rename(tmp_path / folder_name(8)))
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        Manifest.read(tmp_path)


def test_a_later_version_is_named() -> None:
    body = json.loads(example().to_json())
    del body["digest"]
    body |= {"format": FORMAT + 1, "version": "9.9"}
    with pytest.raises(WrongCheckpoint, match=r"has format 2, written by mpdqn 9\.9, and this mpdqn reads format 1"):
        Manifest.from_json(json.dumps(body | {"digest": _digest(body)}), "here")


def test_the_text_of_a_later_version_is_printed_as_it_is_only_where_it_is_printable() -> None:
    body = json.loads(example().to_json())
    del body["digest"]
    body |= {"format": FORMAT + 1, "version": "9\n\x1b[31mEVIL"}
    with pytest.raises(WrongCheckpoint, match=r"written by mpdqn 9\\n\\x1b\[31mEVIL, and") as caught:
        Manifest.from_json(json.dumps(body | {"digest": _digest(body)}), "here")
    assert str(caught.value).isprintable()
    with pytest.raises(DamagedCheckpoint) as damaged:
        Manifest.from_json(json.dumps(body | {"digest": "\x1b[31mEVIL"}), "here")
    assert str(damaged.value).isprintable()


def rewritten(change: Callable[[dict[str, Any]], None]) -> str:
    """A manifest that somebody else wrote, with a digest that is right."""
    body = json.loads(example(2).to_json())
    del body["digest"]
    change(body)
    return json.dumps(body | {"digest": _digest(body)})


def at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what lies under ``path`` to ``value``."""

    def change(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


TENSOR, FILE, ROWS = ("tensors", "online.1.weight"), ("files", "rank-0.bin"), ("rows", "1", "files", 0)
ESCAPES: list[tuple[tuple[str | int, ...], str]] = [
    *(((*TENSOR, "file"), name) for name in ("/etc/passwd", "../rank-0.bin", "a/rank-0.bin", "..", "")),
    *(((*ROWS, "file"), name) for name in ("/etc/passwd", "../../shard-0/1.rows", ".", "a\0b")),
    *((("rows", "1", "folder"), name) for name in ("/etc", "/x/../rows/shard-1", "rows/shard-1", "/run/rows/shard-0")),
]


@pytest.mark.parametrize(("path", "name"), ESCAPES)
def test_a_name_stays_inside_its_folder(path: tuple[str | int, ...], name: str) -> None:
    with pytest.raises(
        DamagedCheckpoint, match=r"here is damaged: .* is not a (name|folder)|not a line of text"
    ) as caught:
        Manifest.from_json(rewritten(at(*path, value=name)), "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", MANIFEST])
def test_a_file_of_a_checkpoint_stays_inside_its_folder(name: str) -> None:
    with pytest.raises(DamagedCheckpoint, match="here is damaged: "):
        Manifest.from_json(rewritten(lambda body: body["files"].update({name: body["files"]["rank-0.bin"]})), "here")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*TENSOR, "file"), "rank-9.bin", "tensor 'online.1.weight' lies in rank-9.bin, which has no digest"),
        ((*TENSOR, "offset"), 1, "tensor 'online.1.weight' ends at byte 9 of rank-0.bin, which has 8"),
        ((*TENSOR, "offset"), -8, "offset is -8, not a count"),
        ((*TENSOR, "bytes"), 4, "float32 [2] has 8 bytes, not 4"),
        ((*TENSOR, "shape"), [2**40, 2**40], "float32 [1099511627776, 1099511627776] has"),
        ((*TENSOR, "shape"), 2, "shape is 2, not a list"),
        ((*TENSOR, "dtype"), "load", "dtype is 'load'; a checkpoint holds float64"),
        ((*TENSOR, "dtype"), ["float32"], "dtype is ['float32']; a checkpoint holds float64"),
        ((*TENSOR, "more"), 1, "does not have the fields file, offset, bytes, dtype, shape"),
        ((*FILE, "bytes"), True, "bytes is True, not a count"),
        ((*FILE, "sha256"), None, "sha256 is None, not a line of text"),
        ((*ROWS, "first"), [0], "has rows from [0] up to [4, 7]"),
        ((*ROWS, "stop"), [4, 2], "has rows from [0, 3] up to [4, 2]"),
        ((*ROWS, "stop"), None, "stop is None, not a list"),
        ((*ROWS, "entry"), [], "[] does not have the fields bytes, sha256"),
        (("rows",), 7, "rows is 7, not a mapping"),
        (("rows", "01"), {}, "rows has the shard '01', not a number"),
        (("rows", "1"), None, "None does not have the fields host, folder, files"),
        (("parameters",), [], "parameters is [], not a mapping"),
        (("parameters", "1.bias"), ["float32"], "parameter '1.bias' has 1 fields, not dtype and shape"),
        (("parameters", "1.bias"), ["float32", None], "1.bias is None, not a list"),
        (("counters",), None, "counters is None, not a mapping"),
        (("plan",), "pp2", "plan is 'pp2', not a mapping"),
        (("round",), "7", "round is '7', not a count"),
        (("written",), 1e300, "written is 1e+300, not a time"),
        (("tensors", "replay.1.\x1b[31m"), {}, "does not have the fields"),
        (("parameters", "\x1b[31m"), ["float32", []], r"a tensor's name is '\x1b[31m', not a line of text"),
        (("run",), 5, "run is 5, not a line of text"),
        (("layout",), "dp2\ndp4", "not a line of text"),
        (("format",), "1", "format is '1', not a count"),
    ],
)
def test_a_malformed_field_is_damage_although_the_digest_is_right(
    path: tuple[str | int, ...], value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DamagedCheckpoint, match=re.escape(message)) as caught:
        Manifest.read(written(tmp_path, rewritten(at(*path, value=value))))
    assert "\n" not in str(caught.value)


def test_a_text_too_deep_to_be_read_is_damage() -> None:
    with pytest.raises(DamagedCheckpoint, match="here is damaged"):
        Manifest.from_json("[" * 200_000, "here")
