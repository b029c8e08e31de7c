"""A server process that has imported what ranks need and forks them: they are ready at once and share its memory.

    main process ── server: imports, one thread, no lock ─┬─ rank 0    the variables, folder, cores and outputs of the
         └ elastic agent (start method "forkserver")      └─ rank 1    main process, as if it had been started by it

The server is multiprocessing's, started with the first pool and kept for the next ones. When the main process ends, in
whatever way, the server notices and ends; the kernel then ends the ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, reduction, resource_tracker, spawn, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mpdqn.children import end_with, state

RANK_MODULES = ("mpdqn.train.run", "mpdqn.bench.trial")
"""Modules that the server imports; with them come all that ranks of training and of a comparison need."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals by which a user or a scheduler ends a job, all processes of it."""

BLOCKED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU)
"""Signals that the server blocks: it ends with the main process only, since its ranks may have work to save."""

LAUNCHER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
)
"""Variables that torch's elastic agent gives each rank, beside those that begin with TORCHELASTIC_."""

RANK_NAME = "mpdqn-rank-"
"""First part of a rank's name in lists of processes (`ps -e`, `top`); its number follows."""

LONGEST_TMPDIR = 60
"""Bytes of a folder for temporary files in which a socket's path still fits; the kernel allows 107 in all."""

TIDYING = "ignore:resource_tracker"
"""A warning filter for multiprocessing's tracker, which removes semaphores after a SIGKILL of the main process."""

CALLERS_PATH = "MPDQN_CALLERS_PYTHONPATH"
"""The variable by which the server learns what its PYTHONPATH would be, had it not been given all places of modules."""

SET_NAME = 15
"""PR_SET_NAME of prctl(2)."""

END_S = 5.0
"""Seconds in which a process that was sent SIGKILL is gone, unless it hangs in the kernel."""


_lock = threading.Lock()
_own: int | None = None
"""The server that `start` has started."""
_started: set[int] = set()
"""Processes that have started a server: this one, and those that it was forked from."""


class Output:
    """A file descriptor of this process; pickled for a process that is started, it is one there, of the same file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[..., Output], tuple[Any]]:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(handle: Any) -> Output:
    return Output(handle.detach())


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Process state that a started process inherits from its parent, and one that the server forks has to be given.

    Args:
        variables: the environment.
        ignored: numbers of the signals that are ignored.
        folder: the current folder.
        cores: cores that the process may use.
        mask: the umask.
        outputs: descriptors of standard output (1) and standard error (2), those that are open.
    """

    variables: dict[str, str]
    ignored: frozenset[int]
    folder: str
    cores: frozenset[int]
    mask: int
    outputs: dict[int, Output]

    @classmethod
    def current(cls) -> Surroundings:
        """Return those of this process."""
        return cls(
            variables=dict(os.environ),
            ignored=frozenset(number for number in BLOCKED if signal.getsignal(number) == signal.SIG_IGN),
            folder=os.getcwd(),
            cores=frozenset(os.sched_getaffinity(0)),
            mask=_umask(),
            outputs={number: Output(number) for number in (1, 2) if _is_open(number)},
        )

    def enter(self, name: str, *, launched: bool = False) -> None:
        """Give them to this process, which was forked for it and ends with the server, and so with the main process.

        Args:
            name: what lists of processes call it.
            launched: it keeps the variables that torch's launcher has given it.
        """
        end_with(getattr(sys.modules.get("mpdqn.preload"), "SERVER", os.getppid()))
        leave_main_process()
        take_signals()
        own = (
            {n: v for n, v in os.environ.items() if n in LAUNCHER or n.startswith("TORCHELASTIC_")} if launched else {}
        )
        os.environ.clear()
        os.environ.update(self.variables | own)
        tempfile.tempdir = None  # to be looked up again
        for ending in self.ignored:
            signal.signal(ending, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):  # as unbuffered as in a process that is started with PYTHONUNBUFFERED
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(write_through=True, line_buffering=True)
        for number in (1, 2):
            given = self.outputs.get(number)
            descriptor = os.open(os.devnull, os.O_WRONLY) if given is None else given.descriptor
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        os.umask(self.mask)
        os.sched_setaffinity(0, self.cores)
        os.chdir(self.folder)
        import torch  # as late as this: the main process starts the server before it imports torch itself

        # torch read these variables, and counted the cores, as the server imported it.
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) else len(self.cores))
        torch.distributed.set_debug_level_from_env()  # type: ignore[attr-defined]  # public, but not in __all__
        ctypes.CDLL(None).prctl(SET_NAME, name.encode(), 0, 0, 0)


def _umask() -> int:
    """Return the mask of this process without setting it, which for a moment would be that of all its threads."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def start() -> None:
    """Start the server if it does not run; it is not waited for. One that is stopped is ended first, with its ranks.

    It is given none of this process's warning filters, which are not those of its ranks.
    """
    global _own
    with _lock:
        servers: Any = forkserver._forkserver
        running = server_pid()
        if running is not None and running == _own:
            if state(running) not in ("", "Z", "T"):
                return
            end()
            with contextlib.suppress(ChildProcessError):  # the program may have waited for it itself
                os.waitpid(running, os.WNOHANG)
            leave_main_process()
        elif running is not None:  # the program's own, or one that multiprocessing started: left to what it has forked
            servers._forkserver_alive_fd = servers._forkserver_address = servers._forkserver_pid = None
        if os.getpid() not in _started:
            _started.add(os.getpid())
            util.Finalize(None, _kill, exitpriority=-1)  # after the program's own processes
            os.register_at_fork(after_in_child=_forget)
        others = [name for name in servers._preload_modules if name not in ("__main__", "mpdqn.preload")]
        get_context("forkserver").set_forkserver_preload([*others, "mpdqn.preload"])
        # Server and tracker keep the mask with which they start; here the signals come a moment later.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        options = list(sys.warnoptions)
        try:
            sys.warnoptions[:] = []
            filters = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), TIDYING]))
            with _variable("PYTHONWARNINGS", filters):
                resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # it has unblocked two of them
            _make_folder()
            with _variable(CALLERS_PATH, os.environ.get("PYTHONPATH", "")), _variable("PYTHONPATH", python_path()):
                forkserver.ensure_running()
        finally:
            sys.warnoptions[:] = options
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _own = server_pid()


def python_path() -> str:
    """Return the PYTHONPATH with which a process finds this mpdqn, and the program's modules, wherever it starts."""
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([place for place in (*sys.path, package_root, path) if place])


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _make_folder() -> None:
    """Make multiprocessing's folder for its sockets, in /tmp if their paths would be too long elsewhere."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            util.get_temp_dir()
        finally:
            tempfile.tempdir = before


def _kill() -> None:
    """End the server with this process, whose end may come amid the server's imports, where it would not notice."""
    if (own := server_pid()) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(own, signal.SIGKILL)


def end() -> None:
    """End the server, all that it has forked, and what it was yet to fork; `start` starts another one."""
    own, deadline = server_pid(), time.monotonic() + END_S
    _kill()
    while own is not None and state(own) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)


def forked(target: Callable[..., object], *args: object, name: str) -> BaseProcess:
    """Return a process, yet to be started, that runs ``target(*args)`` forked from the server; it ends with this one.

    As one that is spawned: ``target`` and ``args`` are pickled, and what they need of a script is imported again.

    Args:
        target: what it runs.
        args: what ``target`` is given.
        name: at most 15 characters, for lists of processes.
    """
    start()
    surroundings = Surroundings.current()
    return get_context("forkserver").Process(target=_run, args=(surroundings, name, target, args), daemon=True)


def _run(surroundings: Surroundings, name: str, target: Callable[..., object], args: tuple[object, ...]) -> None:
    surroundings.enter(name)
    target(*args)


_ours = threading.local()
_preparation = spawn.get_preparation_data


def _preparation_data(name: str) -> dict[str, Any]:
    """Return what multiprocessing tells a new process; in `without_main` without the script that it would run again."""
    data: dict[str, Any] = _preparation(name)
    if getattr(_ours, "without_main", False):
        for key in ("init_main_from_name", "init_main_from_path"):
            data.pop(key, None)
    return data


spawn.get_preparation_data = _preparation_data


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Have the processes that this thread starts meanwhile not run the main script again."""
    _ours.without_main = True
    try:
        yield
    finally:
        _ours.without_main = False


def take_signals() -> None:
    """Take signals as any process does, in one that was forked from the server."""
    for number in BLOCKED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)


def server_pid() -> int | None:
    """Return the server's process; None if this process has started none."""
    own: Any = forkserver._forkserver
    return None if own._forkserver_pid is None else int(own._forkserver_pid)


def leave_main_process() -> None:
    """Drop what keeps the server of the process that this one was forked from alive, and what can ask it for more.

    So it ends with the main process, and ranks with it (`mpdqn.children.end_with`). A pool that this process starts has
    a server of its own.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = server._forkserver_address = server._forkserver_pid = None


def _forget() -> None:
    """In a process that this one forks: its server is not the new one's, and nobody there would release the locks."""
    global _lock
    _lock = threading.Lock()
    servers: Any = forkserver._forkserver
    servers._lock = threading.Lock()
    trackers: Any = resource_tracker._resource_tracker
    trackers._lock = threading.RLock()
    leave_main_process()
