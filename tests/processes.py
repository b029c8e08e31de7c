"""Commands as a user starts them, in processes of their own; and how to see that none is left behind."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from mpdqn import children, forkserver

ROOT = Path(__file__).parents[1]
MPDQN = [sys.executable, "-W", "error", "-m", "mpdqn"]
RUN_S = 280.0
"""A smoke run takes 20 s on two idle cores; the machine may be busy."""
END_S = 60.0


Done = subprocess.CompletedProcess[str]


def start(arguments: list[str], folder: Path, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A command in ``folder``, in a process group of its own; its temporary files name the folder, and it them."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=_variables(folder, variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def _variables(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command: that of the tests, but for their single thread."""
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return own | dict(variables) | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}


def run(
    arguments: list[str],
    folder: Path,
    variables: Mapping[str, str] | None = None,
    seconds: float = RUN_S,
    anew: bool = False,
) -> Done:
    """A command in ``folder`` that ends by itself, and leaves no process and no temporary folder behind.

    Unless it is started ``anew``, a Python module or script is run by a process forked from the server of the tests,
    which has imported what it needs, and its pools by that server as well: nothing is imported again.
    """
    if not anew and arguments[0] == sys.executable and "torch.distributed.run" not in arguments:
        done = forked(arguments, folder, variables, seconds)
    else:
        process = start(arguments, folder, variables)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            end(process)
        done = Done(arguments, process.returncode, out, err)
    assert_nothing_left(folder, torchrun="torch.distributed.run" in arguments)
    return done


def forked(
    arguments: list[str], folder: Path, variables: Mapping[str, str] | None = None, seconds: float = RUN_S
) -> Done:
    """A command that ends by itself, by a process that has imported what it needs; others may run in ``folder``."""
    forkserver.start()
    with tempfile.TemporaryDirectory() as outputs:
        surroundings = replace(
            forkserver.Surroundings.current(),
            variables=_variables(folder, variables or {}),
            folder=str(folder),
            outputs={},
        )
        own: Any = multiprocessing.forkserver
        server = (own._forkserver._forkserver_address, getattr(own._forkserver, "_forkserver_authkey", None))
        process = get_context("forkserver").Process(
            target=_be_command, args=(surroundings, arguments[1:], Path(outputs), *server)
        )
        for name in ("out", "err"):
            (Path(outputs) / name).touch()
        process.start()
        process.join(seconds)
        late = process.is_alive()
        process.kill()
        process.join()
        left = [int(path.name) for path in Path("/proc").glob("[0-9]*") if opened(path, f"{outputs}/")]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = ((Path(outputs) / name).read_text() for name in ("out", "err"))
        assert late or not left, f"{left} were left behind by {arguments}, which said {err}"
        if late:
            raise subprocess.TimeoutExpired(arguments, seconds, out, err)
        assert process.exitcode is not None
        return Done(arguments, process.exitcode, out, err)


def _be_command(
    surroundings: forkserver.Surroundings, arguments: list[str], outputs: Path, address: str, key: bytes | None
) -> None:
    """Do what ``python arguments`` does in its surroundings, but for the imports that have been made."""
    # Its pools are forked from the server that forked it, instead of one of its own.
    inherited: Any = multiprocessing.forkserver
    own = inherited._forkserver
    surroundings.enter("mpdqn-command")
    own._forkserver_address = address
    own._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # which it hands on; the tests keep their server alive
    inherited.ensure_running = own.ensure_running = lambda: None
    if key is not None:  # Python 3.14's server asks for it
        own._forkserver_authkey = key
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(outputs / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), number)
    if arguments[:2] == ["-W", "error"]:
        sys.warnoptions[:] = ["error"]
        warnings.simplefilter("error")
        arguments = arguments[2:]
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, surroundings.folder)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            script = ModuleType("__main__")
            sys.modules["__main__"] = script
            exec(compile(Path(arguments[0]).read_text(), arguments[0], "exec"), script.__dict__)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # what it has started may live on
        os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.communicate()


def processes_of(folder: Path) -> dict[int, str]:
    """The processes that belong to ``folder``, other than this one, by their command lines.

    They name it there, had it as TMPDIR when they were started, or are ranks of a pool in it and what those forked.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            started = str(folder) in line or f"TMPDIR={folder}".encode() in (path / "environ").read_bytes().split(b"\0")
            if line and int(path.name) != os.getpid() and (started or worker_files(path, folder)):  # a zombie has none
                found[int(path.name)] = line
    return found


def opened(process: Path, start: str) -> list[str]:
    """What process /proc/PID has open whose path begins with ``start``."""
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed meanwhile
                found.append(os.readlink(entry))
    return [path for path in found if path.startswith(start)]


def worker_files(process: Path, folder: Path) -> list[str]:
    """What process /proc/PID has open of the notes that ranks of a pool in ``folder`` leave of themselves."""
    own = re.compile(f"{re.escape(str(folder))}/mpdqn-[^/]*/worker-")
    return [path for path in opened(process, f"{folder}/") if own.match(path)]


def workers_of(folder: Path) -> dict[int, int]:
    """The process of each rank of the pool in ``folder`` that lives."""
    (job,) = [*folder.glob("mpdqn-*"), folder / "none"][:1]
    return {rank: pid for rank, pid in children.workers_of(job).items() if pid is not None}


def assert_nothing_left(folder: Path, torchrun: bool = False) -> None:
    assert processes_of(folder) == {}
    assert not [*folder.glob("mpdqn-*"), *folder.glob("pymp-*"), *folder.glob("pytorch-errorfile-*")]
    if not torchrun:  # which leaves a folder for its own logs
        assert not list(folder.glob("torchelastic*"))


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.1)


def run_folder(out: Path) -> Path:
    (folder,) = out.iterdir()
    return folder


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "mpdqn"]
