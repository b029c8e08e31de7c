"""The processes of a pool: which they are, that they end with their parent, and that none holds up the end.

JOB/worker-0  pid and start of rank 0, which keeps the file open: what it forks is known by that,
JOB/worker-1                            and what it starts by TORCHELASTIC_RUN_ID in its environment
WorkerWatch   kills a rank that is stopped, and those that go on after one has failed
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

AGENT_S = 6.0
"""Seconds that torch's agent has to notice that all workers have ended, on a busy machine too."""

ENDING_S = 2.0
"""Seconds between the moment when a process no longer answers and the one when the kernel says that it has ended."""

PEERS_FIRST_S = 5.0
"""Seconds beyond the timeout for which a stopped worker is left to its peers, who can say what they wait for."""


def end_with(parent: int) -> None:
    """Ask the kernel to kill this process when process ``parent`` ends, however it ends (PR_SET_PDEATHSIG)."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def enter(job: Path, rank: int) -> None:
    """Note this process as ``rank`` of the pool in folder ``job``, for as long as it lives."""
    path, own = job / f"worker-{rank}", os.getpid()
    draft = os.open(job / f"worker-{rank}.part", os.O_CREAT | os.O_WRONLY, 0o600)  # never closed
    os.write(draft, f"{own} {started(own)}".encode())
    (job / f"worker-{rank}.part").rename(path)


def workers_of(job: Path) -> dict[int, int | None]:
    """Return the processes of the pool in ``job`` that have begun, by rank; None for one that has ended."""
    found: dict[int, int | None] = {}
    for path in job.glob("worker-*"):
        if path.suffix:
            continue
        pid, since = path.read_text().split()
        alive = started(int(pid)) == since and state(int(pid)) != "Z"
        found[int(path.name.partition("-")[2])] = int(pid) if alive else None
    return found


class AllEnded(BaseException):
    """Raised by `WorkerWatch` in the thread that waits for a pool whose workers have all ended."""


class WorkerWatch:
    """End what would hold the end of a pool up.

    A worker that is stopped: peers find it by its silence, but not once it has left the world that it shared with them.
    Workers that go on after another has failed: torch's agent gives those that take no SIGTERM half a minute.
    And the agent itself: it waits for what each worker returns, also of one that left by ``os._exit(0)``, and for
    workers that a stopped process is to fork.

    A context manager, for the thread that waits; ``stopped`` has the seconds of those that were stopped, by rank,
    ``server_stopped_s`` those of the process that forks them, where that was ended for it; ``vanished`` are the ranks
    that were seen to have ended without a result, and ``ended`` those that were killed because others had.

    Args:
        job: the pool's folder.
        timeout_s: for how long a worker may be stopped (and `PEERS_FIRST_S`).
        num_workers: how many workers there are to be.
        server: the process that forks them; None if this process has not started it.

    Raises:
        AllEnded: in the thread that entered it, if all workers have ended and the agent does not say so.
    """

    def __init__(self, job: Path, timeout_s: float, num_workers: int, server: int | None) -> None:
        self._job, self._limit_s, self._num_workers = job, timeout_s + PEERS_FIRST_S, num_workers
        self._server, self._server_started = server, "" if server is None else started(server)
        self.server_stopped_s = 0.0
        self.stopped: dict[int, float] = {}
        self.vanished: set[int] = set()
        self.ended: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="worker-watch", daemon=True)

    def __enter__(self) -> WorkerWatch:
        self._waiting = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        stopped: dict[int, _Lasting] = {}
        failing, over, server_stopped = _Lasting(), _Lasting(), _Lasting()
        last = time.monotonic()
        while not self._ended.wait(LOOK_S):
            # Where this process was stopped as well, as by Ctrl-Z, that time does not count.
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * LOOK_S), now
            workers = workers_of(self._job)
            running = {rank: pid for rank, pid in workers.items() if pid is not None}
            ended = {rank for rank in workers if rank not in running}
            failed = {rank for rank in ended if not (self._job / f"result-{rank}.pkl").exists()}
            late = failing.seen(bool(failed), elapsed) > 2 * GRACE_S
            if not late:
                self.vanished |= failed
            for rank, pid in running.items():
                seconds = stopped.setdefault(rank, _Lasting()).seen(state(pid) == "T", elapsed)
                waits = failed and (self._job / f"result-{rank}.pkl").exists()  # for those that have failed
                if seconds > self._limit_s:
                    self.stopped[rank] = seconds
                if late or waits:
                    self.ended.add(rank)
                if seconds > self._limit_s or late or waits:
                    _kill(pid)
            missing = len(workers) < self._num_workers
            server_s = server_stopped.seen(self._server_state() == "T", elapsed)
            if missing and server_s > self._limit_s:
                self._end_server(server_s)
            if over.seen(not missing and not running, elapsed) > AGENT_S and not self._ended.is_set():
                thread = ctypes.c_ulong(self._waiting)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(AllEnded))
                if self._server_state() == "T":  # the agent waits for its word, where no exception reaches it
                    self._end_server(server_s)
                return

    def server_is_gone(self) -> bool:
        """Return whether the process that forks workers has ended; it may be about to."""
        deadline = time.monotonic() + ENDING_S
        while self._server_state() not in ("", "Z"):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return self._server is not None

    def _server_state(self) -> str:
        if self._server is None or started(self._server) != self._server_started:
            return ""
        return state(self._server)

    def _end_server(self, stopped_s: float) -> None:
        if self._server is not None:
            self.server_stopped_s = stopped_s
            _kill(self._server)


class _Lasting:
    """For how long a condition has held, over looks at it."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def seen(self, holds: bool, elapsed: float) -> float:
        """Note whether it holds, ``elapsed`` seconds after the last look; since the first that found it, in seconds."""
        self._seconds = (0.0 if self._seconds is None else self._seconds + elapsed) if holds else None
        return self._seconds or 0.0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def end_remaining(job: Path, run_id: str) -> None:
    """End every process of the pool in ``job`` that is still there, a failed worker's own children too.

    Most notice by themselves that their worker is gone and clean up behind it, so that they get some time for it.
    """
    patience = time.monotonic() + GRACE_S
    while left := [pid for pid in _processes() if pid != os.getpid() and _belongs(pid, job, run_id)]:
        late = time.monotonic() - patience
        for pid in left if late > 0 else ():
            _kill(pid)
        if late > GRACE_S:  # it hangs in the kernel, where no signal reaches it
            return
        time.sleep(0.05)


def started_by(parent: int, run_id: str) -> list[int]:
    """Return the children of process ``parent`` that torch's agent started in run ``run_id``."""
    return [pid for pid in _processes() if parent_of(pid) == parent and _mark(run_id) in _environ(pid)]


def started(pid: int) -> str:
    """Return when process ``pid`` was started, in clock ticks since boot; empty if there is none."""
    return _stat(pid, 19)


def state(pid: int) -> str:
    """Return the kernel's letter for what process ``pid`` does, "T" if it is stopped; empty if it is gone."""
    return _stat(pid, 0)


def parent_of(pid: int) -> int:
    """Return the parent of process ``pid``; -1 if there is none."""
    return int(_stat(pid, 1) or -1)


def _belongs(pid: int, job: Path, run_id: str) -> bool:
    """Return whether ``pid`` has the run in its environment, or a file of a worker open that it was forked from."""
    if _mark(run_id) in _environ(pid):
        return True
    try:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(link.startswith(f"{job}/worker-") for link in links)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _mark(run_id: str) -> bytes:
    """Return what tells a process of the run, and all that it started, in their environment."""
    return f"TORCHELASTIC_RUN_ID={run_id}".encode()


def _stat(pid: int, field: int) -> str:
    """Return a field of /proc/PID/stat, counted from the state; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return ""


def _environ(pid: int) -> list[bytes]:
    """Return the environment with which ``pid`` was started; nothing if it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
