"""What ranks say of themselves: `Activity` (what the main thread does), `Beat` (a message of it), `Peer` (who said it).

main thread ── notes ──▶ Activity ── every interval ──▶ Beat ── 1 kB ──▶ Peer, on every other rank
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

BEAT_BYTES = 1024
"""Size of a beat on the wire."""


class Activity:
    """What a rank's main thread is doing ("playing round 3", or an action of a table), and since when.

    Written by the main thread, read by the monitor.
    """

    def __init__(self) -> None:
        self.role = ""
        self._now: tuple[object, float, bool] = ("starting", time.monotonic(), False)

    def set(self, action: object) -> None:
        """Note that the main thread begins ``action``; its text is made when it is asked for."""
        self._now = (action, time.monotonic(), False)

    @contextlib.contextmanager
    def during(self, action: object) -> Iterator[None]:
        """Note that the main thread does ``action`` inside the context, and what it did before after it."""
        before, self._now = self._now, (action, time.monotonic(), False)
        yield
        self._now = (before[0], time.monotonic(), before[2])

    @contextlib.contextmanager
    def waiting(self, what: object) -> Iterator[None]:
        """Note that the main thread waits for ``what`` inside the context; threads beside it note nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, self._now = self._now, (what, time.monotonic(), True)
        yield  # an error leaves the wait noted: it is what the failure is about
        self._now = (before[0], time.monotonic(), before[2])

    def look(self) -> tuple[str, float, bool]:
        """Return the text of the action, its age in seconds, and whether it is a wait for another rank."""
        action, since, waits = self._now
        text = action if isinstance(action, str) else f"computing {action}"
        return text, time.monotonic() - since, waits


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One message of a rank to a peer; ``seen`` is the number of the last beat that it had from that peer."""

    number: int
    seen: int
    state: Literal["running", "leaving", "failed"] = "running"
    role: str = ""
    action: str = ""
    age: float = 0.0
    waits: bool = False

    def encode(self) -> Tensor:
        """Return this beat as uint8 [BEAT_BYTES], its action cut to fit."""
        values, room = asdict(self), BEAT_BYTES
        while len(text := json.dumps(values).encode()) > room:
            longest = max(("role", "action"), key=lambda name: len(values[name]))
            values[longest] = values[longest][: len(values[longest]) // 2]
        return torch.frombuffer(bytearray(text.ljust(room)), dtype=torch.uint8)

    @staticmethod
    def decode(buffer: Tensor) -> Beat:
        """Return the beat that `encode` made ``buffer`` of."""
        return Beat(**json.loads(bytes(buffer.tolist())))


@dataclass(kw_only=True)
class Peer:
    """Another rank as its beats show it. ``silent_s`` counts only time in which this process itself ran."""

    rank: int
    about: dict[str, Any]
    beat: Beat = Beat(number=0, seen=0, action="starting")
    received: float = field(default_factory=time.monotonic)
    heard: bool = True
    silent_s: float = 0.0
    bytes_received: int = 0
    gone: str = ""
    gone_s: float = 0.0
    sent: int = 0
    in_flight: dict[int, tuple[dist.Work | None, Tensor]] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether the peer came to its end in good order."""
        return self.beat.state == "leaving"

    def __str__(self) -> str:
        return name_of(self.rank, self.about, self.beat.role)

    def action(self, since_then: float = 0.0) -> str:
        """Return what the peer was doing when it was last heard of, and for how long, ``since_then`` seconds added."""
        return f"{self.beat.action} (for {self.beat.age + since_then:.0f} s)"


def name_of(rank: int, about: dict[str, Any], role: str) -> str:
    """Return a rank with its host and its part in the layout, as messages name it."""
    return f"rank {rank} (host {about['host']}{f', {role}' if role else ''})"
