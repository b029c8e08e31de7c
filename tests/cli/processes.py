"""Commands as a user starts them, in processes of their own; and how to see that none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
MPDQN = [sys.executable, "-W", "error", "-m", "mpdqn"]
RUN_S = 280.0
"""A smoke run takes 20 s on two idle cores; the machine may be busy."""
END_S = 60.0


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """A command in ``folder``, in a process group of its own; its temporary files name the folder, and it them."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    process = start(arguments, folder)
    try:
        out, err = process.communicate(timeout=RUN_S)
    finally:
        end(process)
    assert_nothing_left(folder, torchrun="torch.distributed.run" in arguments)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that were started with ``folder`` as TMPDIR, by their command lines."""
    found = {}
    mark = f"TMPDIR={folder}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if line:  # a zombie has none
                    found[int(path.name)] = line
    return found


def assert_nothing_left(folder: Path, torchrun: bool = False) -> None:
    assert processes_of(folder) == {}
    assert not list(folder.glob("mpdqn-*"))
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
