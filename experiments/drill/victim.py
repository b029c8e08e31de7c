"""`Victim`: a training run as a user starts it, whose processes can be killed at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mpdqn.children import parent_of
from mpdqn.forkserver import RANK_NAME
from mpdqn.logs import PROGRESS

PATIENCE_S = 300.0
"""After which a run that neither goes on nor ends counts as hanging."""


class Victim:
    """One ``mpdqn train`` under way; a context manager, which ends it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log.open("a")
        self.begin = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mpdqn", "train", *arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit code, when it has ended; TimeoutExpired if it hangs."""
        return self._process.wait(PATIENCE_S)

    def ranks(self) -> list[int]:
        """Return the processes of its ranks: workers, which `mpdqn.forkserver` names so, or itself if it needs none."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                name = (path / "comm").read_text()
                if name.startswith(RANK_NAME) and parent_of(parent_of(int(path.name))) == self._process.pid:
                    found[int(name.removeprefix(RANK_NAME))] = int(path.name)
        return [found[rank] for rank in sorted(found)] or [self._process.pid]

    def kill_one(self, choice: random.Random) -> str:
        """SIGKILL to a random rank; which one. All ranks have ended on return."""
        ranks = self.ranks()
        which = choice.randrange(len(ranks))
        os.kill(ranks[which], signal.SIGKILL)
        self.wait()
        return f"{which} of {len(ranks)}"

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait until ``reached``; False if it ends before.

        Raises:
            TimeoutError: if it hangs.
        """
        patience = time.monotonic() + PATIENCE_S
        while not reached():
            if not self.alive:
                return reached()
            if time.monotonic() > patience:
                raise TimeoutError(f"no progress within {PATIENCE_S:.0f} s; see {self._log.name}")
            time.sleep(0.003)
        return True


def progress_of(folder: Path) -> tuple[int, int]:
    """Frames and updates of the last row of a run; zeros before the first. It is asked often: only that row is read."""
    try:
        with (folder / PROGRESS).open("rb") as file:
            header = file.readline().decode().strip().split(",")
            file.seek(max(len(header), os.fstat(file.fileno()).st_size - 2_000))
            lines = file.read().decode().split("\n")
        last = dict(zip(header, lines[-2].split(","), strict=True))  # what follows the last line break is a row's part
        return int(last["frames"]), int(float(last["updates"]))
    except (OSError, IndexError, KeyError, ValueError):
        return 0, 0
