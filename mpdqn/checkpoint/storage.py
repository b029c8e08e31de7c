"""torch.distributed.checkpoint's storage, as raw bytes under a `Manifest`: nothing is pickled or unpickled.

    save   plan of each rank ─▶ names dealt out ─▶ rank-R.bin, one after the other ─▶ manifest.json ─▶ folder renamed
    load   each rank asks for the names that it needs, whatever rank wrote them

torch decides which rank writes what, and carries a failure of one rank to all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mpdqn.checkpoint.entries import ITEM_BYTES, FileEntry, ShardRows, TensorEntry
from mpdqn.checkpoint.files import DigestedFile, Pace, sync_folder
from mpdqn.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest
from mpdqn.files import open_to_read

ROWS = "rows of shard "
"""How the result is called that tells of a shard's frames."""
FILE = "file of rank "
"""… and of a rank's file."""


class RawWriter(StorageWriter):
    """Writes one checkpoint in the folder ``draft``, which then takes its place as ``folder``.

    Args:
        draft: made here; it is not a checkpoint yet.
        folder: its name when it is whole.
        rank: of this process.
        manifest: what is known before anything is written; files, tensors and rows come in here.
        write_rows: writes this rank's new frames, and says what all frames of its shards are.
        pace: how fast the tensors are written.
    """

    def __init__(
        self,
        draft: Path,
        folder: Path,
        rank: int,
        manifest: Manifest,
        write_rows: Callable[[], Mapping[int, ShardRows]],
        pace: Pace | None = None,
    ) -> None:
        self._draft, self._folder, self._rank = draft, folder, rank
        self._manifest, self._write_rows, self._pace = manifest, write_rows, pace
        self.written: Manifest | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder."""
        self._draft.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are: each rank has a file of its own."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's frames and its part of the tensors."""
        results = [_result(f"{ROWS}{number}", rows) for number, rows in self._write_rows().items()]
        name = f"rank-{self._rank}.bin"
        if plan.items:
            with DigestedFile(self._draft / name, self._pace) as file:
                for item in plan.items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor), f"{item.index.fqn} is no tensor"
                    dtype, offset = str(tensor.dtype).removeprefix("torch."), file.size
                    assert dtype in ITEM_BYTES, f"{item.index.fqn} is of {dtype}, which no manifest holds"
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    entry = TensorEntry(
                        file=name,
                        offset=offset,
                        bytes=file.size - offset,
                        dtype=dtype,
                        shape=tuple(tensor.shape),
                    )
                    results.append(_result(item.index.fqn, entry))
            results.append(_result(f"{FILE}{self._rank}", (name, file.entry)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On one rank: write the manifest, and give the folder its name. From here on it is a checkpoint."""
        files: dict[str, FileEntry] = {}
        tensors: dict[str, TensorEntry] = {}
        rows: dict[int, ShardRows] = {}
        for result in (result for part in results for result in part):
            name, data = result.index.fqn, result.storage_data
            if name.startswith(ROWS):
                rows[int(name.removeprefix(ROWS))] = data
            elif name.startswith(FILE):
                files[data[0]] = data[1]
            else:
                tensors[name] = data
        manifest = replace(self._manifest, files=files, tensors=tensors, rows=dict(sorted(rows.items())))
        with DigestedFile(self._draft / MANIFEST) as file:
            file.write(memoryview(manifest.to_json().encode()))
        sync_folder(self._draft)
        self._draft.rename(self._folder)
        for parent in (self._folder.parent, self._folder.parent.parent):  # the first checkpoint made the parent, too
            sync_folder(parent)
        self.written = manifest

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class RawReader(StorageReader):
    """Reads the tensors of the checkpoint in ``folder``, whose ``manifest`` was read and whose files were checked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader is for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes and dtypes of all tensors."""
        described: dict[str, Any] = {}
        for name, entry in self._manifest.tensors.items():
            size = torch.Size(entry.shape)
            described[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
                size=size,
                chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
            )
        return Metadata(state_dict_metadata=described, storage_data=self._manifest.tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors that were asked for, which have the shapes of the manifest."""
        for item in plan.items:
            entry = self._manifest.tensors[item.storage_index.fqn]
            path = self._folder / entry.file
            with open_to_read(path) as file:
                file.seek(entry.offset)
                data = torch.empty(entry.bytes, dtype=torch.uint8)
                view, done = data.numpy().data, 0
                while done < entry.bytes:
                    if not (count := file.readinto(view[done:])):
                        raise DamagedCheckpoint(f"{path} ends at {entry.offset + done} bytes, within {item}")
                    done += count
            target = planner.resolve_tensor(item).detach()
            target.copy_(data.view(getattr(torch, entry.dtype)).view(entry.shape))
            planner.commit_tensor(item, target)
        done_future: Future[None] = Future()
        done_future.set_result(None)
        return done_future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


def _result(name: str, data: Any) -> WriteResult:
    return WriteResult(index=MetadataIndex(name), size_in_bytes=0, storage_data=data)
