"""The processes of a pool, found in /proc: which they are, that they end with their parent, and that none is stopped.

main process ── workers ── what they started          all have TORCHELASTIC_RUN_ID in their environment
     └ StoppedWatch: a worker that is stopped is silent, also once it has left its world and no peer listens
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType

from mpdqn.failures import GRACE_S

LOOK_S = 2.0
"""Seconds between two looks at the states of the workers."""

PEERS_FIRST_S = 5.0
"""Seconds beyond the timeout for which a stopped worker is left to its peers, who can say what they wait for."""


def end_with(parent: int) -> None:
    """Make the kernel kill this process when ``parent`` ends, even if that is killed and can end nothing itself."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


class StoppedWatch:
    """Kill a worker of this process that has been stopped (SIGSTOP) for longer than ``timeout_s`` and some seconds.

    Peers find a stopped rank by its silence, but not once it has left the world that it shared with them: it would hold
    the end of the run up for ever. A context manager; ``found`` has the seconds by rank.
    """

    def __init__(self, run_id: str, timeout_s: float) -> None:
        self._mark, self._parent = mark(run_id), os.getpid()
        self._limit_s = timeout_s + PEERS_FIRST_S
        self.found: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stopped-watch", daemon=True)

    def __enter__(self) -> StoppedWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        stopped: dict[int, float] = {}
        last = time.monotonic()
        while not self._ended.wait(LOOK_S):
            # Where this process was stopped as well, as by Ctrl-Z, that time does not count.
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * LOOK_S), now
            states = {pid: state(pid) for pid in workers_of(self._parent, self._mark)}
            stopped = {pid: stopped.get(pid, 0.0) + elapsed for pid, how in states.items() if how == "T"}
            for pid, seconds in stopped.items():
                if seconds > self._limit_s:
                    self.found[_rank(pid)] = seconds
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def end_remaining(run_id: str) -> None:
    """End every process of the job that is still there, a failed worker's own children too.

    The launcher's variable TORCHELASTIC_RUN_ID, which they inherit, tells them. Most notice by themselves that their
    worker is gone and clean up behind it, so that they get some time for it.
    """
    own = mark(run_id)
    patience = time.monotonic() + GRACE_S
    while left := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if own in _environ(pid)]:
        late = time.monotonic() - patience
        for pid in left if late > 0 else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if late > GRACE_S:  # it hangs in the kernel, where no signal reaches it
            return
        time.sleep(0.05)


def workers_of(parent: int, marked: bytes) -> list[int]:
    """The children of process ``parent`` that were started with ``marked`` in their environment."""
    everyone = map(int, filter(str.isdigit, os.listdir("/proc")))
    return [pid for pid in everyone if _parent(pid) == parent and marked in _environ(pid)]


def mark(run_id: str) -> bytes:
    """Return the entry of the environment by which a process of the run, and all that it started, are known."""
    return f"TORCHELASTIC_RUN_ID={run_id}".encode()


def state(pid: int) -> str:
    """Return the kernel's letter for what process ``pid`` does, "T" if it is stopped; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _rank(pid: int) -> int:
    """Return the rank that the launcher gave process ``pid``; -1 if it is gone."""
    return next((int(entry[5:]) for entry in _environ(pid) if entry.startswith(b"RANK=")), -1)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def _environ(pid: int) -> list[bytes]:
    """The environment with which process ``pid`` was started; empty if it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
