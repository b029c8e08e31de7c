"""`run_ranks`: n gloo ranks of one function, under a timeout; the first failure is raised here."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from mpdqn.launch import launch


def run_ranks(function: Callable[..., Any], *args: Any, num_ranks: int, timeout: float = 120.0) -> list[Any]:
    """Run ``function(*args)`` on ``num_ranks`` ranks of a pool and return their results by rank.

    The function opens its own `mpdqn.mesh.World`. Call from the main thread.

    Raises:
        WorkerError: the first failure of a rank.
        TimeoutError: if the ranks have not ended after ``timeout`` seconds; they have by then, and shown their stacks.
    """
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        return launch(_watched, function, args, timeout, num_workers=num_ranks)
    except KeyboardInterrupt:
        if not late.is_set():
            raise
        raise TimeoutError(f"{num_ranks} ranks did not end within {timeout:g} s; see their stacks above") from None
    finally:
        timer.cancel()
        timer.join()


def _watched(function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> Any:
    faulthandler.dump_traceback_later(0.9 * timeout)
    result = function(*args)
    faulthandler.cancel_dump_traceback_later()
    return result
