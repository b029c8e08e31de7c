"""`Status`: how a run is, in ``status.json`` for other programs and as `mpdqn status` prints it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_type_hints

from mpdqn.checkpoint.entries import printable
from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.files import write_whole
from mpdqn.train.lock import in_use
from mpdqn.train.recorded import check_type

STATUS = "status.json"

RUNNING, STOPPED, FINISHED, FAILED, KILLED = "running", "stopped", "finished", "failed", "killed"
"""What ``state`` can be. In the file, a run that was killed is still "running": only the lock of its folder tells."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run is.

    ``frames`` of ``total_frames``; ``checkpoint`` is the newest that was written: round, frames, the time in seconds
    since 1970, bytes, and seconds of writing; ``problem`` is what went wrong last, such as a checkpoint that could not
    be written. ``updated`` in seconds since 1970. ``resumed`` counts how often the run was gone on with, and
    ``replay_lost`` the shards that were lost on the way.
    """

    state: str
    frames: int
    total_frames: int
    updates: int
    layout: str
    host: str
    pid: int
    updated: float
    resumed: int = 0
    replay_lost: tuple[int, ...] = ()
    row: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    def write(self, folder: Path) -> None:
        """Put it in the file of ``folder``, which other programs always find whole."""
        # Not waited for: after a power cut the checkpoints tell how far it was.
        write_whole(folder / STATUS, json.dumps(asdict(self), indent=1) + "\n", sync=False)


def now(**values: Any) -> Status:
    """The status of a run in this process, at this moment."""
    return Status(host=os.uname().nodename, pid=os.getpid(), updated=time.time(), **values)


def read_status(folder: Path) -> Status:
    """The status of the run in ``folder``; its state is "killed" if nobody trains it and it did not say why.

    Raises:
        ValueError: if there is no status of this version.
    """
    path = folder / STATUS
    try:
        data = json.loads(path.read_text())
        for name, kind in get_type_hints(Status).items():
            check_type(name, data[name], kind)
        status = Status(**{f.name: data[f.name] for f in fields(Status)} | {"replay_lost": tuple(data["replay_lost"])})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder} has no readable {STATUS} ({printable(str(error))}); give the folder of a training run"
        ) from error
    if status.state == RUNNING and not in_use(folder):
        return Status(**asdict(status) | {"state": KILLED, "replay_lost": status.replay_lost})
    return status


def describe(folder: Path) -> str:
    """What `mpdqn status` says of the run in ``folder``.

    Raises:
        ValueError: as `read_status`.
    """
    status = read_status(folder)
    lines = [
        f"state        {status.state}{f' ({status.problem})' if status.problem and status.state == FAILED else ''}",
        f"frames       {status.frames:,} of {status.total_frames:,} ({status.frames / status.total_frames:.1%}), "
        f"{status.updates:,} updates",
        f"layout       {status.layout}, process {status.pid} on {status.host}, {_ago(status.updated)}",
    ]
    if status.row:
        names = ("frames_per_s", "updates_per_s", "loss", "mean_return", "evaluation_return")
        lines.append("last row     " + ", ".join(f"{n} {status.row[n]:.4g}" for n in names if n in status.row))
    if status.resumed:
        lines.append(f"resumed      {status.resumed} times")
    if status.replay_lost:
        lines.append(f"replay lost  shards {list(status.replay_lost)}: not the run that was never stopped")
    if status.problem and status.state != FAILED:
        lines.append(f"problem      {status.problem}")
    for manifest in CheckpointFolder(folder).manifests():
        lines.append(
            f"checkpoint   {manifest.frames:,} frames, {_size(manifest.num_bytes)} and {_size(manifest.num_row_bytes)} "
            f"of frames, {_ago(manifest.written)}, layout {manifest.layout}"
        )
    if status.state in (STOPPED, KILLED, FAILED):
        lines += ["", f"Go on with it: mpdqn train --resume {folder}"]
    return "\n".join(printable(line) for line in lines)


def _ago(at: float) -> str:
    passed = timedelta(seconds=round(time.time() - at))
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC, {passed} ago"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
