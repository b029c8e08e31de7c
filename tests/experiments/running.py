"""An experiment's real main, made small."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests import processes

SECONDS = 800.0
"""The longest takes a minute on two idle cores; the machine may be busy."""


def run(experiment: str, *flags: str) -> str:
    """Run ``experiment``, from a folder of its own; what it printed."""
    command = [sys.executable, "-W", "error", "-m", f"experiments.{experiment}", "--smoke", *flags]
    with tempfile.TemporaryDirectory(prefix="experiment-") as folder:
        done = processes.run(command, Path(folder), {"OMP_NUM_THREADS": "2"}, SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout
