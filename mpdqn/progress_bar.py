"""`ProgressBar`: tqdm on standard error, without a lock that processes share."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's bar. One process draws all bars of a run, on rank 0, so that a lock between its threads is enough.

    tqdm's own lock is a named semaphore of the system, which a killed rank leaves behind.
    """

    _lock = threading.RLock()  # where tqdm.get_lock looks

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"file": sys.stderr} | options)
