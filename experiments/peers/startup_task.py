"""One way to start n ranks that have imported what mpdqn's ranks run; in a process of its own, which starts them.

python -m experiments.peers.startup_task METHOD N          prints the starts as JSON, see `Start`

    begin ── start n ranks ── each: imports, notes the time ── all there: each notes its memory ── end
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mpdqn.children import parent_of
from mpdqn.forkserver import RANK_MODULES
from mpdqn.launch import launch

SPAWNED, FORKED = "spawned", "forkserver"

PATIENCE_S = 300.0
"""Seconds for which a rank waits for the others."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Time and memory of one start of all ranks.

    Args:
        ready_s: seconds until the last rank had imported everything.
        memory_bytes: of each rank then, pages that n processes share counted to 1/n (Pss).
        server_bytes: of the process that forked them, likewise; 0 if there is none.
    """

    ready_s: float
    memory_bytes: tuple[int, ...]
    server_bytes: int


def rank(folder: str, num_ranks: int) -> None:
    """Be one rank: note in ``folder`` when it is ready and, once all are, how much memory it has."""
    for name in RANK_MODULES:
        importlib.import_module(name)
    own = Path(folder)
    note(own / f"ready-{os.getpid()}", str(time.time()))
    wait_for(own, "ready", num_ranks)
    note(own / f"memory-{os.getpid()}", str(memory_of(os.getpid())))
    wait_for(own, "memory", num_ranks)
    if not (own / "server").exists():
        note(own / "server", str(os.getppid()))
        note(own / "server-memory", str(memory_of(os.getppid())))


def note(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(text)
    draft.rename(path)


def wait_for(folder: Path, what: str, number: int) -> None:
    """Wait until there are ``number`` notes of ``what`` in ``folder``; TimeoutError after `PATIENCE_S`."""
    patience = time.monotonic() + PATIENCE_S
    while (found := len(list(folder.glob(f"{what}-[0-9]*")))) < number:
        if time.monotonic() > patience:
            raise TimeoutError(f"{found} of {number} ranks were there after {PATIENCE_S:.0f} s")
        time.sleep(0.005)


def memory_of(process: int) -> int:
    """Return the Pss of a process in bytes: its pages, those that n processes share counted to 1/n."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{process}/smaps_rollup has no line Pss")


def memory_of_tree(root: int) -> int:
    """Return the Pss in bytes of process ``root`` and all that descend from it, as far as they can be read."""
    parents = {pid: parent_of(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    total = 0
    for process in found:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            total += memory_of(process)
    return total


def measured(begin: Callable[[str], object]) -> Start:
    """Start ranks by ``begin``, which is given the folder for their notes and returns when they have ended."""
    with tempfile.TemporaryDirectory() as folder:
        at = time.time()
        begin(folder)
        notes = {path.name: path.read_text() for path in Path(folder).iterdir()}
        return Start(
            ready_s=max(float(text) for name, text in notes.items() if name.startswith("ready-")) - at,
            memory_bytes=tuple(int(text) for name, text in sorted(notes.items()) if name.startswith("memory-")),
            server_bytes=int(notes["server-memory"]) if int(notes["server"]) != os.getpid() else 0,
        )


def starts(method: str, num_ranks: int) -> list[Start]:
    """Start ranks by ``method``: once, or twice where the second start finds a server that is warm."""

    def forked(folder: str) -> object:
        return launch(rank, folder, num_ranks, num_workers=num_ranks)

    def separately(folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=rank, args=(folder, num_ranks)) for _ in range(num_ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    return [measured(separately)] if method == SPAWNED else [measured(forked), measured(forked)]


if __name__ == "__main__":
    print(json.dumps([asdict(start) for start in starts(sys.argv[1], int(sys.argv[2]))]))
