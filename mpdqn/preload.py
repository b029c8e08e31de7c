"""Imported by the server that forks ranks (`mpdqn.forkserver`), by nothing else: importing it changes the process."""

import contextlib
import gc
import importlib
import os
import signal
import sys
from multiprocessing import spawn

from mpdqn.forkserver import BLOCKED, CALLERS_PATH, RANK_MODULES, leave_main_process

SERVER = os.getpid()


def _in_child() -> None:
    if os.getppid() != SERVER:  # a process that a rank has forked
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # it was seeded in the server, alike for all


os.register_at_fork(after_in_child=_in_child)
begin = spawn._main


def _begin(fd: int, parent_sentinel: int) -> int:
    """Begin as any process that the server has forked, also one of the program's own."""
    leave_main_process()
    return begin(fd, parent_sentinel)


spawn._main = _begin
signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # again: multiprocessing itself may have started this server anew
if (path := os.environ.pop(CALLERS_PATH, None)) is not None:
    os.environ["PYTHONPATH"] = path
    if not path:
        del os.environ["PYTHONPATH"]
for name in RANK_MODULES:
    with contextlib.suppress(Exception):  # a rank that needs it will say why it cannot be imported
        importlib.import_module(name)
gc.collect()
gc.freeze()  # what is imported stays: a rank's collector passes over it, and so leaves its pages shared
