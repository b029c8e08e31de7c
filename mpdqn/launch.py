"""`launch`: run one function in a pool of worker processes, through torch's own elastic launcher.

    main process ── elastic agent ─┬─ rank 0    forked from a server that has imported mpdqn (`mpdqn.forkserver`)
                                   ├─ rank 1    JOB is a folder with job.pkl; a worker leaves worker-R, and
                                   └─ …         result-R.pkl or failure-R.json

The workers see the environment that torchrun gives, so a function runs alike in a pool and under torchrun. The first
failure ends all workers at once, and the failure that is raised is the first *cause*: a worker that only lost its
peer says so after the peer had time to say why. Workers end with the main process, however it ends, and what they
started themselves ends with them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import fields
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import cloudpickle
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mpdqn.children import AllEnded, WorkerWatch, end_remaining, enter, started_by, workers_of
from mpdqn.failures import GRACE_S, POOL_FOLDER, Failure
from mpdqn.forkserver import RANK_NAME, Surroundings, end, python_path, server_pid, start, without_main
from mpdqn.heartbeat import LISTENER
from mpdqn.launched import launched_local_world_size, launched_rank

SAME_SIGNAL_S = 5.0
"""A second signal within so many seconds is the same one: schedulers send it to all processes, parents hand it on."""

AGENTS = ("torch.distributed.elastic", "torch.multiprocessing")
"""How the names of the elastic agent's loggers begin."""

NO_RESULT = "it ended without a result"
"""What is said of a worker of which nothing else is known."""

MOST_WORKERS = 120
"""multiprocessing hands a process that it forks 256 file descriptors at most, and torch's agent two for each worker."""

SERVER_LOST = 255
"""The exit code that multiprocessing gives a rank whose server is gone, and with it the true one."""


class WorkerError(RuntimeError):
    """A worker failed; the message gives its rank and its own error, a note its traceback."""


def launch(
    function: Callable[..., Any], *args: Any, num_workers: int, forward_sigterm: bool = False, timeout_s: float = 45.0
) -> list[Any]:
    """Run ``function(*args)`` in ``num_workers`` processes on this host and return their results by rank.

    The function and its arguments are pickled by value where they come from ``__main__``, so that scripts and notebooks
    need no guard. They are the workers' own environment: `mpdqn.mesh.World.open` finds its peers there.

    Args:
        function: what every worker runs; its result must be picklable.
        args: the same for every worker.
        num_workers: how many processes, at least 1.
        forward_sigterm: SIGTERM is for the function to see in each worker, and ends nothing by itself; a later one
            does.
        timeout_s: seconds for which a worker may be stopped (SIGSTOP), and some more, before it is killed; its peers in
            a `World` have a limit of their own.

    Raises:
        ValueError: if there are to be more workers than one process can start.
        WorkerError: the first worker's failure that is not a consequence of another's; all workers have ended by then.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; all workers have ended by then.
    """
    if not 1 <= num_workers <= MOST_WORKERS:
        raise ValueError(
            f"num_workers is {num_workers} but a pool has 1 to {MOST_WORKERS}; start more of them with torchrun"
        )
    run_id = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="mpdqn-") as folder:
        job = Path(folder).resolve()  # as /proc tells it of those that have a file in it open
        (job / "job.pkl").write_bytes(cloudpickle.dumps((function, args)))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_workers,
            run_id=run_id,
            rdzv_backend="c10d",
            rdzv_endpoint=str(job / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            start_method="forkserver",
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(job / "agent")),  # or it would leave a folder behind
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT" + ",SIGTERM" * (not forward_sigterm),
            **_shutdown_limit(),
        )
        start()
        watch = WorkerWatch(job, timeout_s, num_workers, server_pid())
        try:
            with (
                _quiet_agent(),
                _environment(_worker_environment()),
                _Forwarding(job if forward_sigterm else None) as forwarding,
                watch,
                without_main(),  # what ranks need of it is pickled by value
            ):
                elastic_launch(config, run_rank)(str(job), Surroundings.current())
        except (EOFError, ConnectionError) as error:
            if any(Failure.read(job, rank) is not None for rank in range(num_workers)):
                raise _first_cause(job, {}, num_workers, watch) from None
            if not watch.server_is_gone():
                raise WorkerError(f"a rank could not be started: {type(error).__name__}: {error}") from error
            raise WorkerError(_server_end(watch)) from None
        except RendezvousError as error:
            raise OSError(
                f"the workers' rendezvous in {folder} failed: {error}; set TMPDIR to another folder"
            ) from error
        except ChildFailedError as error:
            cause = _first_cause(job, error.failures, num_workers, watch)
            if forwarding.done and "SIGTERM" in str(cause):  # it came before the function had begun
                raise KeyboardInterrupt("stopped by SIGTERM") from None
            raise cause from None
        except AllEnded:
            missing = {rank for rank in range(num_workers) if not (job / f"result-{rank}.pkl").exists()}
            if missing:
                watch.vanished |= missing
                raise _first_cause(job, {}, num_workers, watch) from None
        except SignalException as error:
            if len(workers_of(job)) < num_workers and not _environment.in_use():
                end()  # or the others would come when nobody waits for them
            raise KeyboardInterrupt(f"stopped by {error.sigval.name}") from None
        finally:
            if watch.server_stopped_s:
                watch.server_is_gone()  # it was killed: the next pool is to find it so
            end_remaining(job, run_id)
        return [pickle.loads((job / f"result-{rank}.pkl").read_bytes()) for rank in range(num_workers)]


def run_rank(job: str, surroundings: Surroundings) -> None:
    """Be one worker of the pool in folder ``job``: run its function, leave the result; end the process on failure."""
    rank = launched_rank()
    enter(Path(job), rank)
    POOL_FOLDER.set(Path(job))
    code = _run(Path(job), rank, surroundings)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where the server was started without it
            with contextlib.suppress(OSError, ValueError):  # the function may have closed it
                stream.flush()
    if code:  # at once: the ordinary way out would wait for peers that are gone
        os._exit(code)
    # Before Python 3.14 a process that was forked does not run them at its end. A world that was left with an error,
    # which the function returns, still has threads inside gloo, and no goodbye to say.
    if not any(thread.name == LISTENER for thread in threading.enumerate()):
        atexit._run_exitfuncs()
    Event.wait = _look  # type: ignore[method-assign]


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C: the agent hands on what this worker had from the terminal itself.

    Raises:
        KeyboardInterrupt: always.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _look(self: Any, timeout: float | None = None) -> bool:
    """Be `Event.wait` where a worker waits for the agent's word that its result was read; not in the queue of sleepers.

    The agent's `Event.set` waits until each sleeper has woken, also for one that was stopped or killed meanwhile.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while not self._flag.get_value():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _run(job: Path, rank: int, surroundings: Surroundings) -> int:
    """Run the function of the pool in ``job``, leave its result or failure, return the exit code."""
    try:
        surroundings.enter(f"{RANK_NAME}{rank}", launched=True)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt_once)
        function, args = cloudpickle.loads((job / "job.pkl").read_bytes())
        result = function(*args)
        draft = job / f"result-{rank}.part"  # whole or not at all: its name says that this worker has not failed
        draft.write_bytes(cloudpickle.dumps(result))
        # From here on it only waits for the others, which may have work to save; torch counts on it to wait.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        draft.rename(job / f"result-{rank}.pkl")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException as error:
        failure = Failure.of(error)
        failure.write(job, rank)
        if failure.consequence:
            time.sleep(GRACE_S)
        return 1
    return 0


def _first_cause(
    job: Path, failures: Mapping[int, ProcessFailure], num_workers: int, watch: WorkerWatch
) -> WorkerError:
    """The error to show: a worker's own fault before a killed worker before a consequence, the earliest of each."""
    read = {rank: Failure.read(job, rank) for rank in range(num_workers)}
    told = {rank: failure for rank, failure in read.items() if failure is not None}
    killed = {rank for failure in told.values() for rank in failure.ended}
    ending = min((failure.at for failure in told.values()), default=float("inf")) + 2 * GRACE_S
    # The agent tells of one rank, and ends the others for it: unless the watch has ended that one, it came first.
    first = failures.keys() - told.keys() - watch.ended
    found: list[tuple[int, float, int, str, str]] = []
    for rank in range(num_workers):
        if rank in told:
            failure = told[rank]
            text = f"{failure.kind}: {failure.message}"
            found.append((2 if failure.consequence else 0, failure.at, rank, text, failure.trace))
        elif rank in failures:
            code, at = failures[rank].exitcode, float(failures[rank].timestamp)
            # The agent ends the others once one has failed, with SIGTERM and later with SIGKILL; their peers end those
            # that are silent. Neither is the cause.
            ended = code == -signal.SIGTERM or at > ending or rank in killed | watch.ended
            text = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            if code == SERVER_LOST and watch.server_is_gone():
                text = _server_end(watch)
            if rank in watch.stopped:
                text = f"stopped (SIGSTOP) for {watch.stopped[rank]:.0f} s, and killed"
            found.append((3 if ended else 1, at, rank, text, ""))
        elif rank in watch.vanished:
            found.append((3 if first or rank in killed else 1, 0.0, rank, NO_RESULT, ""))
    _, _, rank, text, trace = min(found)
    error = WorkerError(f"rank {rank} of {num_workers} failed: {text}")
    if trace:
        error.add_note(f"\nOn rank {rank}:\n{trace}")
    return error


def _server_end(watch: WorkerWatch) -> str:
    """Return what became of the process that forks ranks."""
    if watch.server_stopped_s:
        return f"the process that forks ranks was stopped (SIGSTOP) for {watch.server_stopped_s:.0f} s, and killed"
    return "the process that forks ranks has ended"


def _shutdown_limit() -> dict[str, Any]:
    """Return the setting, where torch has it, of how long workers may take to end once one of them has failed.

    torch's own half a minute is for workers that save their work; ours save none after a failure.
    """
    name = "shutdown_timeout"
    return {name: round(GRACE_S)} if name in {field.name for field in fields(LaunchConfig)} else {}


def a_peer_ended() -> bool:
    """Return whether one of the processes that were started together with this one, on this host, has ended."""
    if (job := POOL_FOLDER.get()) is not None:
        return None in workers_of(job).values()
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:  # another launcher, which leaves no trace of its own
        return False
    return len(started_by(os.getppid(), run_id)) < launched_local_world_size()


def _worker_environment() -> dict[str, str]:
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # Otherwise the agent opens a TCP store for the workers, which listens on all interfaces.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_DISTRIBUTED_DEBUG": "OFF",
        "TORCH_MP_PARALLEL_START": "0",  # from this thread, to which `without_main` applies
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # The workers must find the same mpdqn and the user's own modules, wherever they were started from.
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
    }


class _environment:
    """The given variables in os.environ, for the agents' children to inherit; after the last pool the old values."""

    _lock = threading.Lock()
    _pools = 0
    _old: ClassVar[dict[str, str | None]] = {}

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __enter__(self) -> None:
        with self._lock:
            if self._pools == 0:
                for name in (*self._variables, "TORCHELASTIC_SIGNALS_TO_HANDLE"):
                    self._old[name] = os.environ.get(name)
            _environment._pools += 1
            os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            _environment._pools -= 1
            if self._pools == 0:
                self.restore()

    @classmethod
    def in_use(cls) -> bool:
        """Return whether a pool is under way."""
        return cls._pools > 0

    @classmethod
    def restore(cls) -> None:
        """Give the variables their old values."""
        for name, value in cls._old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Forwarding:
    """SIGTERM handed on to the workers of a pool instead of ending them, in the main thread; with None as it is."""

    def __init__(self, job: Path | None) -> None:
        self._wanted = job is not None and threading.current_thread() is threading.main_thread()
        self._job, self.done, self._at = job or Path(), False, 0.0

    def __enter__(self) -> _Forwarding:
        if self._wanted:
            self._before = signal.signal(signal.SIGTERM, self._forward)
        return self

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.done:
            if time.monotonic() - self._at > SAME_SIGNAL_S:
                raise SignalException("stopped by a second SIGTERM", signal.SIGTERM)
            return
        self.done, self._at = True, time.monotonic()
        workers = [pid for pid in workers_of(self._job).values() if pid is not None]
        if not workers:  # they are not there yet
            raise SignalException("stopped before it began", signal.SIGTERM)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            signal.signal(signal.SIGTERM, self._before)


class _quiet_agent:
    """The elastic agent's log held back, until the last pool has ended: what it has to say is raised as one error."""

    _lock = threading.Lock()
    _pools = 0
    _levels: ClassVar[dict[str, int]] = {}

    def __enter__(self) -> None:
        # The agent sets handlers of its own, where it may (in the main thread), and leaves them behind.
        may = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if may else ()
        self._handlers = {name: signal.getsignal(name) for name in handled}
        with self._lock:
            if self._pools == 0:  # torch gives each of its loggers a level of its own
                names = [*logging.root.manager.loggerDict]
                self._levels.update({name: logging.getLogger(name).level for name in names if name.startswith(AGENTS)})
            _quiet_agent._pools += 1
            for name in self._levels:
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            _quiet_agent._pools -= 1
            if self._pools == 0:
                self.restore()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @classmethod
    def restore(cls) -> None:
        """Let the agents speak again."""
        for name, level in cls._levels.items():
            logging.getLogger(name).setLevel(level)


def _forget_pools() -> None:
    """In a process that this one forks: no pool is under way there, and nobody would release the locks."""
    for held in (_environment, _quiet_agent):
        if held._pools:
            held.restore()
        held._lock, held._pools = threading.Lock(), 0


os.register_at_fork(after_in_child=_forget_pools)
