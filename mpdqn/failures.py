"""`PeerLost` and `Failure`: a lost peer told from a fault of one's own, and the record that a failed rank leaves.

A rank of a pool (`mpdqn.launch.launch`) writes its failure into the pool's folder, where the parent process finds it;
under another launcher it prints one line.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

GRACE_S = 3.0
"""Seconds for which a rank that lost its peer waits before it fails, so that the peer's own failure is seen first."""

POOL_FOLDER: ContextVar[Path | None] = ContextVar("POOL_FOLDER", default=None)
"""Folder of the pool that started this process, seen by the function that the pool runs; None without a pool."""


class PeerLost(RuntimeError):
    """Another rank is gone, or silent for longer than the timeout, or the link to it is."""


def tells_of_lost_peer(error: BaseException) -> bool:
    """Return whether ``error`` says that another process is gone or silent, rather than that this one is at fault."""
    lost = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "Operation timed out",
        "timeout caused pair closure",  # the message before this one timed out
        "connectFullMesh failed",
        "wait timeout after",
    )
    return isinstance(error, PeerLost) or (isinstance(error, RuntimeError) and any(text in str(error) for text in lost))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type: torch appends C++ stacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank failed. ``consequence`` says that it only lost a peer; ``at`` is in seconds since the epoch.

    ``ended`` are ranks that no longer answered and that this one therefore killed.
    """

    kind: str
    message: str
    trace: str
    consequence: bool
    at: float
    ended: tuple[int, ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Return the failure that ``error`` is, its notes included."""
        return cls(
            kind=type(error).__name__,
            message=str(error) + "".join(f" ({note})" for note in getattr(error, "__notes__", ())),
            trace="".join(traceback.format_exception(error)),
            consequence=tells_of_lost_peer(error),
            at=time.time(),
        )

    @staticmethod
    def path(folder: Path, rank: int) -> Path:
        """Return where the failure of ``rank`` stands in a pool's ``folder``."""
        return folder / f"failure-{rank}.json"

    @classmethod
    def read(cls, folder: Path, rank: int) -> Self | None:
        """Return the failure of ``rank`` in a pool's ``folder``; None if it left none."""
        path = cls.path(folder, rank)
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write(self, folder: Path, rank: int) -> None:
        """Write this failure into a pool's ``folder``, unless ``rank`` left an earlier one."""
        path = self.path(folder, rank)
        if path.exists():
            return
        draft = folder / f"failure-{rank}.part"  # whole or not at all: the parent may end this process meanwhile
        draft.write_text(json.dumps(asdict(self)))
        draft.rename(path)

    def report(self, folder: Path | None, rank: int) -> None:
        """Write this failure into a pool's ``folder``; without a pool, print it on one line of standard error."""
        if folder is not None:
            self.write(folder, rank)
        else:
            print(f"\nmpdqn: {self.message}", file=sys.stderr, flush=True)
