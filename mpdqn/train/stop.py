"""`StopSignal`: SIGTERM asks a run to write a checkpoint and leave, wherever it arrives.

SIGTERM ─▶ mpdqn train ─▶ each worker ┐
SIGTERM ─▶ torchrun ────▶ each worker ┼─▶ the ranks agree at the end of a round's acting ─▶ checkpoint ─▶ exit code 75
SIGTERM ─▶ one worker ────────────────┘
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from mpdqn.launch import SAME_SIGNAL_S, a_peer_ended
from mpdqn.launched import launched

EXIT_RESUMABLE = 75
"""The exit code of a run that was asked to stop and wrote a checkpoint: EX_TEMPFAIL of <sysexits.h>, "try again"."""


class StopSignal:
    """Notes SIGTERM while in the context, in the main thread; elsewhere, and before, it ends the process.

    So does a second one, seconds later. A launcher also sends SIGTERM when another rank has failed; then there is
    nothing to wait for, and the process ends as well.
    """

    def __init__(self) -> None:
        self.received, self._at = False, 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received and time.monotonic() - self._at > SAME_SIGNAL_S
        if again or (launched() and a_peer_ended()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.received, self._at = True, time.monotonic()

    def __enter__(self) -> Self:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
