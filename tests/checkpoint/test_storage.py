"""Tensors are raw bytes on the disk, every one of them told by the manifest, and nothing is unpickled to read them."""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpdqn.checkpoint.entries import FileEntry
from mpdqn.checkpoint.files import check_file
from mpdqn.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, folder_name
from mpdqn.checkpoint.storage import RawReader, RawWriter
from tests.checkpoint.test_manifest import example

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = ((), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4, 4))


def kinds() -> dict[str, Tensor]:
    tensors = {f"{d} {s}": (100 * torch.rand(s)).to(d) for d in DTYPES for s in SHAPES}
    tensors |= {
        f"{d} channels last": tensors[f"{d} {SHAPES[-1]}"].to(memory_format=torch.channels_last) for d in DTYPES
    }
    tensors |= {f"{d} columns": (100 * torch.rand(6, 8)).to(d)[1::2, ::3] for d in DTYPES}
    tensors |= {f"{d} expanded": (100 * torch.rand(1, 4)).to(d).expand(3, 4) for d in DTYPES}
    return tensors | {"learned": torch.rand(3, requires_grad=True)}


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def written(root: Path, tensors: dict[str, Tensor]) -> tuple[Path, Manifest]:
    root.mkdir(exist_ok=True)
    manifest = replace(example(0), files={}, tensors={}, rows={})
    folder = root / folder_name(manifest.round)
    writer = RawWriter(root / "draft", folder, 0, manifest, dict)
    save(dict(tensors), storage_writer=writer)
    assert writer.written is not None
    assert Manifest.read(folder) == writer.written
    return folder, writer.written


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_file_that_is_not_a_plain_one_is_damage(kind: str, tmp_path: Path) -> None:
    """A pipe has 0 bytes, and whoever opened one that a manifest names with as many waited for ever."""
    path, empty = tmp_path / "rank-0.bin", FileEntry(bytes=0, sha256=hashlib.sha256().hexdigest())
    (tmp_path / "elsewhere").touch()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
    why = "is a symbolic link but must be" if kind == "link" else "is not a plain file but must be"
    with pytest.raises(DamagedCheckpoint, match=rf"rank-0\.bin {why}"):
        check_file(path, empty)
    path.rename(tmp_path / MANIFEST)
    with pytest.raises(DamagedCheckpoint, match=why):
        Manifest.read(tmp_path)
    check_file(tmp_path / "elsewhere", empty)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_is_a_link_is_damage(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "made", {"x": torch.ones(1)})
    (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(DamagedCheckpoint, match="is a symbolic link but must be a folder of its own"):
        Manifest.read(tmp_path / folder.name)


@pytest.mark.usefixtures("alone")
def test_the_files_hold_the_tensors_and_nothing_else(tmp_path: Path) -> None:
    tensors = kinds()
    folder, manifest = written(tmp_path / "made", tensors)
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "rank-0.bin"]
    assert not (tmp_path / "made" / "draft").exists()
    check_file(folder / "rank-0.bin", manifest.files["rank-0.bin"])
    data, end = (folder / "rank-0.bin").read_bytes(), 0
    assert manifest.tensors.keys() == tensors.keys()
    for name, entry in sorted(manifest.tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        assert entry.offset == end, "without gaps"
        end += entry.bytes
        assert data[entry.offset : end] == raw(tensors[name]), name
        assert (entry.shape, f"torch.{entry.dtype}") == (tuple(tensors[name].shape), str(tensors[name].dtype))
    assert end == len(data)


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_all_kinds_come_back_without_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = kinds()
    folder, manifest = written(tmp_path, tensors)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    # Into targets of any layout in memory.
    targets = {
        name: torch.full_like(t, 7, requires_grad=False) for name, t in tensors.items() if "expanded" not in name
    }
    targets |= {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items() if "expanded" in name}
    load(dict(targets), storage_reader=RawReader(folder, manifest), no_dist=True)
    for name, target in targets.items():
        assert raw(target) == raw(tensors[name]), name


@pytest.mark.usefixtures("alone")
def test_some_of_them_are_read_alone(tmp_path: Path) -> None:
    folder, manifest = written(tmp_path, {"a": torch.arange(4.0), "b": torch.arange(4.0, 8.0)})
    targets = {"b": torch.zeros(4)}
    load(dict(targets), storage_reader=RawReader(folder, manifest))
    assert targets["b"].tolist() == [4, 5, 6, 7]


@pytest.mark.usefixtures("alone")
def test_a_file_that_ended_meanwhile_fills_nothing_silently(tmp_path: Path) -> None:
    folder, manifest = written(tmp_path, {"a": torch.arange(4.0)})
    path = folder / "rank-0.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointException, match=r"rank-0\.bin ends at 13 bytes"):
        load({"a": torch.zeros(4)}, storage_reader=RawReader(folder, manifest))


@pytest.mark.usefixtures("alone")
def test_what_a_killed_run_left_in_the_draft_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    for name in (MANIFEST, "rank-0.bin"):
        (tmp_path / "draft" / name).write_bytes(bytes(100_000))
    folder, manifest = written(tmp_path, {"a": torch.arange(4.0)})
    check_file(folder / "rank-0.bin", manifest.files["rank-0.bin"])
    assert manifest.num_bytes == 16
