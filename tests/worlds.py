"""Worlds of ranks that are forked from a process which has imported mpdqn: ready in a fraction of a second.

They find each other by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as with any launcher but our own; nobody ends
the others when one fails. `TwoHosts` gives each rank a network of its own, with a link that can be cut.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mpdqn import forkserver

CLONE_NEWNET = 0x40000000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TwoHosts:
    """Two network namespaces with one link between them: 10.77.0.1 is host 0, 10.77.0.2 host 1. Needs root."""

    numbers = itertools.count()

    def __init__(self) -> None:
        mark = f"mpdqn{os.getpid() % 10_000}{next(self.numbers)}"
        self.names = [f"{mark}a", f"{mark}b"]
        self.ends = [f"v{name}"[-15:] for name in self.names]
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self.ends[0], "netns", self.names[0], "type", "veth", "peer", "name", self.ends[1],
            "netns", self.names[1])  # fmt: skip
        for host, (name, end) in enumerate(zip(self.names, self.ends, strict=True)):
            _ip("-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", end)
            for device in (end, "lo"):
                _ip("-n", name, "link", "set", device, "up")

    def slow(self, rate: str) -> None:
        """Limit what each host sends to ``rate``, such as 1mbit."""
        for name, end in zip(self.names, self.ends, strict=True):
            command = f"tc qdisc add dev {end} root tbf rate {rate} burst 16kbit latency 100ms".split()
            subprocess.run(["ip", "netns", "exec", name, *command], check=True, capture_output=True)

    def cut(self) -> None:
        """Set the link down on both sides; nobody is told."""
        for name, end in zip(self.names, self.ends, strict=True):
            _ip("-n", name, "link", "set", end, "down")

    def close(self) -> None:
        for name in self.names:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Ranks:
    """``num_ranks`` processes that run ``function(*args)``; their standard error is in ``folder``/rank-R."""

    def __init__(
        self, function: Callable[..., Any], *args: Any, num_ranks: int, folder: Path, hosts: TwoHosts | None = None
    ) -> None:
        forkserver.start()
        surroundings = forkserver.Surroundings.current()
        context = multiprocessing.get_context("forkserver")
        address = "127.0.0.1" if hosts is None else "10.77.0.1"
        environment = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
        environment["LOCAL_WORLD_SIZE"] = str(num_ranks if hosts is None else 1)
        self.folder, self.processes = folder, list[BaseProcess]()
        self._ended: dict[int, float] = {}
        for rank in range(num_ranks):
            own = environment | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo" if hosts is None else hosts.ends[rank]}
            name = None if hosts is None else hosts.names[rank]
            process = context.Process(
                target=_run, args=(surroundings, function, args, own, name, folder / f"rank-{rank}")
            )
            process.start()
            threading.Thread(target=self._note_end, args=(rank, process), daemon=True).start()
            self.processes.append(process)

    def _note_end(self, rank: int, process: BaseProcess) -> None:
        while process.is_alive():
            time.sleep(0.05)
        self._ended[rank] = time.time()

    def said(self, rank: int) -> str:
        path = self.folder / f"rank-{rank}"
        return path.read_text() if path.exists() else ""

    def wait(self, seconds: float) -> dict[int, float]:
        """Wait for the end of every rank; the seconds since the epoch at which each ended."""
        deadline = time.monotonic() + seconds
        while len(self._ended) < len(self.processes):
            alive = [p.pid for rank, p in enumerate(self.processes) if rank not in self._ended]
            said = "".join(f"\nrank {rank} said:\n{self.said(rank)}" for rank in range(len(self.processes)))
            assert time.monotonic() < deadline, f"{alive} live on after {seconds:g} s{said}"
            time.sleep(0.05)
        return self._ended

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
            process.join()


@contextlib.contextmanager
def ranks(function: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Ranks]:
    started = Ranks(function, *args, **options)
    try:
        yield started
    finally:
        started.close()


def _run(
    surroundings: forkserver.Surroundings,
    function: Callable[..., Any],
    args: Any,
    environment: dict[str, str],
    host: str | None,
    out: Path,
) -> None:
    """The body of one rank."""
    surroundings.enter("mpdqn-test-rank")
    if host is not None:
        with Path(f"/run/netns/{host}").open() as space:
            assert ctypes.CDLL(None).setns(space.fileno(), CLONE_NEWNET) == 0
    file = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(file, 2)
    os.environ.update(environment)
    try:
        function(*args)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)
