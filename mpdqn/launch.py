"""`launch`: run one function in a pool of worker processes, through torch's own elastic launcher.

    main process ── elastic agent ─┬─ python -m mpdqn.launch JOB PID   rank 0
                                   ├─ python -m mpdqn.launch JOB PID   rank 1    JOB is a folder with job.pkl; a worker
                                   └─ …                                          leaves result-R.pkl or failure-R.json

The workers see the environment that torchrun gives, so a function runs alike in a pool and under torchrun. The first
failure ends all workers at once, and the failure that is raised is the first *cause*: a worker that only lost its
peer says so after the peer had time to say why. Workers end with the main process (PID), however it ends, and what they
started themselves ends with them.
"""

from __future__ import annotations

import contextlib
import logging
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
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mpdqn.children import StoppedWatch, end_remaining, end_with, mark, workers_of
from mpdqn.failures import GRACE_S, POOL_FOLDER, Failure
from mpdqn.heartbeat import LISTENER
from mpdqn.launched import launched_local_world_size, launched_rank

SAME_SIGNAL_S = 5.0
"""A second signal within so many seconds is the same one: schedulers send it to all processes, parents hand it on."""


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
        WorkerError: the first worker's failure that is not a consequence of another's; all workers have ended by then.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; all workers have ended by then.
    """
    run_id = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="mpdqn-") as folder:
        job = Path(folder)
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
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(job / "agent")),  # or it would leave a folder behind
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT" + ",SIGTERM" * (not forward_sigterm),
            **_shutdown_limit(),
        )
        try:
            with (
                _quiet_agent(),
                _environment(_worker_environment()),
                _Forwarding(run_id if forward_sigterm else None) as forwarding,
                StoppedWatch(run_id, timeout_s) as stopped,
            ):
                elastic_launch(config, sys.executable)("-m", "mpdqn.launch", str(job), str(os.getpid()))
        except RendezvousError as error:
            raise OSError(
                f"the workers' rendezvous in {folder} failed: {error}; set TMPDIR to another folder"
            ) from error
        except ChildFailedError as error:
            cause = _first_cause(job, error.failures, num_workers, stopped.found)
            if forwarding.done and "SIGTERM" in str(cause):  # it came before the function had begun
                raise KeyboardInterrupt("stopped by SIGTERM") from None
            raise cause from None
        except SignalException as error:
            raise KeyboardInterrupt(f"stopped by {error.sigval.name}") from None
        finally:
            end_remaining(run_id)
        return [pickle.loads((job / f"result-{rank}.pkl").read_bytes()) for rank in range(num_workers)]


def run_worker(job: Path, parent: int) -> int:
    """The body of one worker of process ``parent``: run the job, leave its result or failure, return the exit code."""
    end_with(parent)
    rank = launched_rank()
    POOL_FOLDER.set(job)
    try:
        function, args = cloudpickle.loads((job / "job.pkl").read_bytes())
        result = function(*args)
        (job / f"result-{rank}.pkl").write_bytes(cloudpickle.dumps(result))
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
    job: Path, failures: Mapping[int, ProcessFailure], num_workers: int, stopped: Mapping[int, float]
) -> WorkerError:
    """The error to show: a worker's own fault before a killed worker before a consequence, the earliest of each."""
    read = {rank: Failure.read(job, rank) for rank in range(num_workers)}
    told = {rank: failure for rank, failure in read.items() if failure is not None}
    killed = {rank for failure in told.values() for rank in failure.ended}
    ending = min((failure.at for failure in told.values()), default=float("inf")) + 2 * GRACE_S
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
            ended = code == -signal.SIGTERM or at > ending or rank in killed
            text = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            if rank in stopped:
                text = f"stopped (SIGSTOP) for {stopped[rank]:.0f} s, and killed"
            found.append((3 if ended else 1, at, rank, text, ""))
    _, _, rank, text, trace = min(found)
    error = WorkerError(f"rank {rank} of {num_workers} failed: {text}")
    if trace:
        error.add_note(f"\nOn rank {rank}:\n{trace}")
    return error


def _shutdown_limit() -> dict[str, Any]:
    """Return the setting, where torch has it, of how long workers may take to end once one of them has failed.

    torch's own half a minute is for workers that save their work; ours save none after a failure.
    """
    name = "shutdown_timeout"
    return {name: round(GRACE_S)} if name in {field.name for field in fields(LaunchConfig)} else {}


def a_peer_ended() -> bool:
    """Whether one of the processes that torch's launcher started with this one, on this host, has ended."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:  # another launcher, which leaves no trace of its own
        return False
    return len(workers_of(os.getppid(), mark(run_id))) < launched_local_world_size()


def _worker_environment() -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # Otherwise the agent opens a TCP store for the workers, which listens on all interfaces.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_DISTRIBUTED_DEBUG": "OFF",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # The workers must find the same mpdqn and the user's own modules, wherever they were started from.
        "PYTHONPATH": os.pathsep.join([p for p in (*sys.path, package_root, path) if p]),
        "PYTHONUNBUFFERED": "1",
    }


class _environment:
    """The given variables in os.environ, for the agent's children to inherit, and the old values afterwards."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __enter__(self) -> None:
        self._old = {name: os.environ.get(name) for name in (*self._variables, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self._old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Forwarding:
    """SIGTERM handed on to the workers of a run instead of ending them, in the main thread; with None as it is."""

    def __init__(self, run_id: str | None) -> None:
        self._wanted = run_id is not None and threading.current_thread() is threading.main_thread()
        self._run_id, self.done, self._at = run_id, False, 0.0

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
        workers = workers_of(os.getpid(), mark(self._run_id or ""))
        if not workers:  # they are not there yet
            raise SignalException("stopped before it began", signal.SIGTERM)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            signal.signal(signal.SIGTERM, self._before)


class _quiet_agent:
    """The elastic agent's log held back: what it has to say is raised as one clear error."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.distributed.elastic")
        self._level = self._logger.level
        # The agent sets handlers of its own, where it may (in the main thread), and leaves them behind.
        own = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if own else ()
        self._handlers = {name: signal.getsignal(name) for name in handled}
        self._logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
        for name, handler in self._handlers.items():
            signal.signal(name, handler)


if __name__ == "__main__":
    code = run_worker(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # A failed worker leaves at once: the ordinary way out would wait for peers that are gone. So does one that left its
    # world with an error which it returns: a peer could wake threads inside gloo while the interpreter ends.
    listens = any(thread.name == LISTENER for thread in threading.enumerate())
    os._exit(code) if code or listens else sys.exit(0)
