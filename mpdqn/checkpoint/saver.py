"""`Saver`: writes checkpoints beside training, each whole or not at all.

    training   … round 1200 │ copy what changes │ round 1201 … 1300 …     rows of frames are read where they lie
    thread                  └── frames, tensors, manifest, rename ──┘

A failure, such as a full disk, leaves the checkpoints that there were, and is told by `result`. Where the cores train,
the thread rests most of the time, until somebody waits for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from mpdqn.checkpoint.entries import RowsEntry, ShardRows
from mpdqn.checkpoint.files import Pace, sync_folder
from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.manifest import Manifest
from mpdqn.checkpoint.rows import NewRows, live_rows
from mpdqn.checkpoint.storage import RawWriter
from mpdqn.mesh import World
from mpdqn.replay import VirtualShards

NICENESS = 10
"""Of the writing thread, nice(2): a tenth of the weight of the threads that train."""
SHARE = 0.04
"""Of a core's time that it computes beside training on the CPU. Steps are slower by about twice as much: the system's
own writing, and what is in the caches, come on top."""


class NotSaved(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was written: its manifest (on rank 0; None elsewhere) and what it took.

    ``copying_s`` seconds of the training thread, ``writing_s`` seconds beside it; ``new_row_bytes`` bytes of frames
    that this rank wrote.
    """

    manifest: Manifest | None
    copying_s: float
    writing_s: float
    new_row_bytes: int


class Saver:
    """One rank's part in writing checkpoints. Building one is collective over the world.

    Args:
        world: all ranks of the run.
        folder: where the checkpoints are.
        keep: how many of them.
        shards: those of this rank; None where it has none.
        rows: the files of frames that there are of these shards, from the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        world: World,
        folder: CheckpointFolder,
        *,
        keep: int,
        shards: VirtualShards | None = None,
        rows: Mapping[int, Sequence[RowsEntry]] | None = None,
    ) -> None:
        self._world, self._folder, self._keep, self._shards = world, folder, keep, shards
        self._group = world.group(range(world.size), "gloo", "checkpoints")
        self._rows: dict[int, tuple[RowsEntry, ...]] = {
            v: tuple((rows or {}).get(v, ())) for v in (shards.owned if shards is not None else ())
        }
        self._copies: dict[str, Tensor] = {}
        self._new: dict[int, NewRows] = {}
        self._frames_written = threading.Event()
        self._pace = Pace()
        self._thread: threading.Thread | None = None
        self._outcome: Saved | NotSaved | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, state: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Copy ``state`` and begin to write it, with the frames of this rank's shards. Collective over the world.

        Waits for the checkpoint before, if that is still being written.

        Args:
            state: this rank's tensors by name; of a name that several ranks have, one is written.
            manifest: of the checkpoint, as far as it is known, on every rank alike.
        """
        self.wait()
        begin = time.perf_counter()
        copied = self._copy(state)
        shards = self._shards
        self._new = {} if shards is None else {v: NewRows.since(shards[v], self._rows[v]) for v in shards.owned}
        live = {v: live_rows(self._rows[v], new.shard) for v, new in self._new.items()}
        copying_s = time.perf_counter() - begin
        self._frames_written.clear()
        self._pace = Pace(SHARE if self._world.device.type == "cpu" else 1.0)
        self._thread = threading.Thread(
            target=self._write, args=(copied, manifest, live, copying_s), name="checkpoint", daemon=True
        )
        self._thread.start()

    def make_way(self, steps: int) -> None:
        """Wait until frames are written that ``steps`` more steps of every environment would overwrite."""
        if not self._frames_written.is_set() and any(new.overwritten_by(steps) for new in self._new.values()):
            self._pace.hurry()
            with self._world.activity.during("writing the frames of a checkpoint"):
                self._frames_written.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._pace.hurry()
            with self._world.activity.during("writing a checkpoint"):
                self._thread.join()
            self._thread = None

    def result(self) -> Saved | NotSaved | None:
        """What came of the last checkpoint, once: None while it is being written and after it was told."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` in memory of its own, which is kept for the next time: new memory is slow."""
        for name in self._copies.keys() - state.keys():
            del self._copies[name]
        for name, tensor in state.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = copy
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return dict(self._copies)

    def _write(
        self,
        state: dict[str, Tensor],
        manifest: Manifest,
        live: Mapping[int, tuple[RowsEntry, ...]],
        copying_s: float,
    ) -> None:
        """The thread's work. Whatever happens is told by `result`; an error of one rank is an error of all."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._outcome = NotSaved(f"the checkpoint of round {manifest.round} was not written to its end")
        begin = time.perf_counter()
        draft, whole = self._folder.draft(manifest.round), self._folder.folder(manifest.round)
        written: dict[int, tuple[RowsEntry, ...]] = {}

        def write_rows() -> dict[int, ShardRows]:
            where = {}
            for v, new in self._new.items():
                folder = self._folder.make_shard_folder(v)
                written[v] = live[v] + ((new.write(folder / f"{draft.stem}.rows", self._pace),) if len(new) else ())
                where[v] = ShardRows(host=socket.gethostname(), folder=str(folder.resolve()), files=written[v])
                sync_folder(folder)
            if where:
                sync_folder(self._folder.rows)
                sync_folder(self._folder.rows.parent)
            self._frames_written.set()
            return where

        writer = RawWriter(draft, whole, self._world.rank, manifest, write_rows, self._pace)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            save(state, storage_writer=writer, planner=planner, process_group=self._group)
            if self._world.rank == 0:
                self._folder.rotate(self._keep)
            if dist.get_world_size(self._group) > 1:
                dist.barrier(self._group)
            self._rows |= written
            self._folder.remove_unused_rows(self._rows, {v: [r.file for r in rows] for v, rows in self._rows.items()})
            new_bytes = sum(self._rows[v][-1].entry.bytes for v, new in self._new.items() if len(new))
            self._outcome = Saved(
                manifest=writer.written,
                copying_s=copying_s,
                writing_s=time.perf_counter() - begin,
                new_row_bytes=new_bytes,
            )
        except (CheckpointException, Exception) as error:
            self._outcome = NotSaved(f"the checkpoint of round {manifest.round} was not written: {_first(error)}")
            # All ranks know of it. After another error, such as a rank that died, one may still be making it whole:
            # what is left over then is deleted when the run goes on.
            if isinstance(error, CheckpointException) and not whole.exists():
                with contextlib.suppress(OSError):
                    for v, rows in written.items():
                        for one in rows[len(live[v]) :]:
                            (self._folder.shard_folder(v) / one.file).unlink(missing_ok=True)
                if self._world.rank == 0:
                    shutil.rmtree(draft, ignore_errors=True)
        finally:
            self._frames_written.set()


def _first(error: BaseException) -> str:
    """The first rank's own words."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{_first(cause)} (rank {rank})"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
