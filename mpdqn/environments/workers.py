"""`Workers`: simulators in processes of their own, which may die without anybody noticing.

An episode is a function of its seed and its actions. Each worker's handle here keeps both, so that a worker that was
killed is replaced, its episodes are played again up to where they were, and the request it died of is made once more:

    handle  ── step a₀ ─▶ worker ─▶ x₁ ── step a₁ ─▶ worker ✗
            ── open, replay (seed, [a₀]), step a₁ ─▶ new worker ─▶ x₂        the caller sees x₁, x₂
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from mpdqn.environments.simulator import SimulatorConfig, Transition

MAX_DEATHS = 3
"""Deaths in a row, of one request, after which it is given up."""
ANSWER_TIMEOUT_S = 300.0
"""Seconds after which a worker that does not answer counts as dead."""


class Workers:
    """N simulators, divided among worker processes in runs of neighbours.

    Args:
        config: of each simulator.
        indices: the N environments' global indices, for errors.
        num_workers: how many processes, 1 to N.
        timeout_s: how long an answer may take.

    Raises:
        ValueError: if a simulator cannot be made.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        *,
        indices: Sequence[int],
        num_workers: int,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        parts = np.array_split(np.arange(len(indices)), num_workers)
        self._workers = [
            _Worker(config, part.tolist(), label=[indices[i] for i in part], timeout_s=timeout_s) for part in parts
        ]
        try:
            for worker in self._workers:  # all are starting by now
                worker.answer()
        except BaseException:
            self.close()
            raise

    @property
    def num_restarts(self) -> int:
        """Workers that died and were replaced."""
        return sum(worker.num_restarts for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The worker processes."""
        return [worker.pid for worker in self._workers]

    def begin(self, seeds: dict[int, int]) -> dict[int, NDArray[np.uint8]]:
        """Begin the episodes with these seeds; their first frames [C, H, W]."""
        parts = [{i: seeds[i] for i in worker.numbers if i in seeds} for worker in self._workers]
        return {i: frame for answer in self._ask_all("begin", parts) for i, frame in answer.items()}

    def step(self, actions: list[Any]) -> list[Transition]:
        """Take one action in each of the N."""
        parts = [{i: actions[i] for i in worker.numbers} for worker in self._workers]
        outcomes: dict[int, Transition] = {}
        for answer in self._ask_all("step", parts):
            outcomes |= answer
        return [outcomes[i] for i in range(len(actions))]

    def replay(self, episodes: dict[int, tuple[int, list[Any]]]) -> dict[int, NDArray[np.uint8]]:
        """Go where each seed and its actions lead; the last frames [C, H, W]."""
        parts = [{i: episodes[i] for i in worker.numbers if i in episodes} for worker in self._workers]
        return {i: frame for answer in self._ask_all("replay", parts) for i, frame in answer.items()}

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        for worker in self._workers:
            worker.end()

    def _ask_all(self, verb: str, parts: list[dict[int, Any]]) -> list[dict[int, Any]]:
        asked = [(worker, part) for worker, part in zip(self._workers, parts, strict=True) if part]
        for worker, part in asked:
            worker.ask(verb, part)
        return [worker.answer() for worker, _ in asked]


class _Worker:
    """One process and what it takes to replace it: each of its episodes' seed and actions."""

    def __init__(self, config: SimulatorConfig, numbers: list[int], *, label: list[int], timeout_s: float) -> None:
        self.numbers = numbers
        self.num_restarts = 0
        self._name, self._label, self._timeout_s = config.name, label, timeout_s
        self._advice = "" if config.apart else "; with workers=0 the simulator fails here, where it can be debugged"
        # By value where it comes from the user's script, as his own environments do.
        self._opening = cloudpickle.dumps(("open", config, numbers))
        self._episodes: dict[int, tuple[int, list[Any]]] = {}
        self._asked: tuple[str, dict[int, Any]] = ("replay", {})  # an empty request, until there is one
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, verb: str, part: dict[int, Any]) -> None:
        """Make a request, to be answered by `answer`. That it cannot be sent is noticed there."""
        self._asked = verb, part
        self._send((verb, part))

    def answer(self) -> dict[int, Any]:
        """The answer to the request, from this process or the ones that replace it.

        Raises:
            ValueError: as the simulator did, while it was made.
            RuntimeError: if a simulator failed, or `MAX_DEATHS` processes died of the request.
        """
        for _ in range(MAX_DEATHS):
            try:
                if not self._opened:
                    self._open()
                result: dict[int, Any] = self._receive() or {}
            except (EOFError, OSError):
                reason = self._reason()
                self.end()
                self.num_restarts += 1
                self._start()
            else:
                self._record()
                return result
        self.end()
        raise RuntimeError(
            f"the worker of environments {self._label} of {self._name!r} died {MAX_DEATHS} times in a row at the same "
            f"step ({reason}){self._advice}"
        )

    def end(self) -> None:
        """End the process."""
        self._finalizer()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        thread = "main" if threading.current_thread() is threading.main_thread() else "other"
        command = [sys.executable, "-m", "mpdqn.environments.worker", str(theirs.fileno()), str(os.getpid()), thread]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ | _environment()
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection)
        self._opened = False
        self._send_bytes(self._opening)

    def _open(self) -> None:
        """Have a new process do again what the old one had done, and make the request of it."""
        self._receive()
        verb, part = self._asked
        begun = part if verb in ("begin", "replay") else {}
        self._send(("replay", {i: episode for i, episode in self._episodes.items() if i not in begun}))
        self._receive()
        self._send(self._asked)
        self._opened = True

    def _record(self) -> None:
        """What was answered has happened, and would have to happen again."""
        verb, part = self._asked
        if verb == "begin":
            self._episodes |= {i: (seed, []) for i, seed in part.items()}
        elif verb == "replay":
            self._episodes |= {i: (seed, list(actions)) for i, (seed, actions) in part.items()}
        elif verb == "step":
            for i, action in part.items():
                self._episodes[i][1].append(action)

    def _send(self, request: tuple[Any, ...]) -> None:
        self._send_bytes(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))

    def _send_bytes(self, request: bytes) -> None:
        try:
            self._connection.send_bytes(request)
        except OSError:  # it is dead, which the answer will tell
            return

    def _receive(self) -> Any:
        if not self._connection.poll(self._timeout_s):
            raise TimeoutError
        state, result = pickle.loads(self._connection.recv_bytes())
        if state == "failed":
            told, trace = result
            self.end()
            kind = RuntimeError if self._opened else ValueError
            error = kind(f"environments {self._label} of {self._name!r} failed in their worker: {told}")
            error.add_note(f"\nIn the worker:\n{trace}")
            raise error
        return result

    def _reason(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"no answer in {self._timeout_s:.0f} s"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    """End a worker: it leaves by itself when nobody can ask any more, and is killed if it is still busy then."""
    connection.close()
    try:
        process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    # It must find the same mpdqn and the user's own modules, wherever it is started from.
    return {
        "PYTHONPATH": os.pathsep.join([p for p in (*sys.path, package_root, path) if p]),
        "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    }
