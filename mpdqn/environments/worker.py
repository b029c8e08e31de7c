"""The body of one worker process: simulators that are told what to do through a socket.

    request   ("open", config, [i, …])  ("begin", {i: seed})  ("step", {i: action})  ("replay", {i: (seed, [action])})
    answer    ("done", result)  or  ("failed", (message, traceback))

`mpdqn.environments.workers` starts it as ``python -m mpdqn.environments.worker FD PARENT``, and not by forking or
through multiprocessing, so that it works from scripts without a guard, from notebooks and beside threads.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from mpdqn.environments.simulator import Simulator


def serve(requests: Connection) -> None:
    """Do what is asked until the other end is closed."""
    simulators: dict[int, Simulator] = {}
    while True:
        try:
            verb, *arguments = pickle.loads(requests.recv_bytes())
        except EOFError:
            return
        try:
            answer = ("done", _do(simulators, verb, *arguments))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            answer = ("failed", (told, traceback.format_exc()))
        requests.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))


def _do(simulators: dict[int, Simulator], verb: str, *arguments: Any) -> Any:
    match verb, *arguments:
        case "open", config, numbers:
            simulators.update({i: Simulator(config) for i in numbers})
            return None
        case "begin", seeds:
            return {i: simulators[i].begin(seed) for i, seed in seeds.items()}
        case "step", actions:
            return {i: simulators[i].step(action) for i, action in actions.items()}
        case "replay", episodes:
            return {i: simulators[i].replay(seed, actions) for i, (seed, actions) in episodes.items()}
    raise AssertionError(verb)


def end_with(parent: int, *, by_kernel: bool) -> None:
    """End this process when process ``parent`` ends, even by SIGKILL and while a simulator is busy.

    ``by_kernel``: the kernel's own signal comes when the *thread* ends that started this process, so that it is only
    for workers that the main thread started. Without it a thread of ours looks once a second.
    """
    if by_kernel:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes us
    end_with(int(sys.argv[2]), by_kernel=sys.argv[3] == "main")
    serve(Connection(int(sys.argv[1])))
