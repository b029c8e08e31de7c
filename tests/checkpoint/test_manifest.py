"""A manifest is read back as it was written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpdqn.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    FileEntry,
    Manifest,
    RowsEntry,
    ShardRows,
    TensorEntry,
    WrongCheckpoint,
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
        rows={v: ShardRows(host="here", folder="/rows", files=(rows,)) for v in range(num_shards)},
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
    from mpdqn.checkpoint.manifest import _digest

    body = json.loads(example().to_json())
    del body["digest"]
    body |= {"format": FORMAT + 1, "version": "9.9"}
    with pytest.raises(WrongCheckpoint, match=r"has format 2, written by mpdqn 9\.9, and this mpdqn reads format 1"):
        Manifest.from_json(json.dumps(body | {"digest": _digest(body)}), "here")
