"""`Heartbeat`: small messages between all ranks that tell a busy peer from a silent one.

    rank 0   main thread  0F0 0F1 … wait for B ┐              main thread  wait for F … 1F0 1B0        rank 1
             monitor  [1] ── beat 7: "waiting for B from rank 1", 0.2 s ──▶ listener of rank 0  [2]
             listener of rank 1 ◀── beat 5: "1F0", 0.1 s, has seen 7 ──  monitor

    [1] every interval the monitor sends its beat to every peer, unless too many wait there unseen
    [2] a listener notes each beat of its peer; from then on the peer's silence counts anew
    [3] a peer that was silent for longer than the timeout, or that said that it failed, ends this process

No message between ranks has a time limit of its own: a large one over a slow link takes as long as it takes. What has
a limit is *silence*: no beat, and no byte from another host. A rank that computes, compiles, plays or evaluates for an
hour still beats, as long as what it calls releases Python's GIL; a stopped process, a lost host or a dead link does
not. The monitor ends the process itself, because the main thread may be inside gloo or NCCL, where no Python exception
reaches it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mpdqn.beat import BEAT_BYTES, Activity, Beat, Peer, name_of
from mpdqn.children import started
from mpdqn.failures import GRACE_S, Failure, PeerLost, first_line
from mpdqn.traffic import bytes_from, own_addresses

NO_LIMIT = timedelta(days=365)
"""The time limit of a message: none. Silence has one."""

MOST_UNSEEN = 5_000
"""Beats that may be under way to one peer, 5 MB of them."""

LISTENER = "heartbeat-listener"
"""Name of the threads that wait inside gloo for beats."""

ENDING_S = 2.0
"""Seconds that a rank which lost a peer has to say so."""


class Heartbeat:
    """This rank's beats and its view of its peers. Building one is collective over the world.

    Args:
        rank: this rank.
        group: a gloo group of all ranks that nothing else uses.
        timeout_s: seconds of silence after which a peer is lost.
        activity: what this rank's main thread notes.
        pool: the folder of the pool that started this process; None without a pool.
        store_port: TCP port of the launcher's store, whose bytes say nothing of a rank.
    """

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup,
        timeout_s: float,
        activity: Activity,
        *,
        pool: Path | None = None,
        store_port: int = 0,
    ) -> None:
        self.rank, self.timeout_s, self.activity = rank, timeout_s, activity
        self.interval_s = min(1.0, timeout_s / 10)
        self.on_loss: list[Callable[[str], None]] = []
        self._group, self._pool, self._store_port = group, pool, store_port
        self._stopping, self._state, self._why = threading.Event(), "running", ""
        self._named_after = timeout_s
        size = dist.get_world_size(group)
        abouts: list[dict[str, Any]] = [{}] * size
        dist.barrier(group)  # from here on there are connections, whose addresses are told
        dist.all_gather_object(abouts, _about(), group=group)
        self._own = abouts[rank]
        self.peers = [Peer(rank=r, about=abouts[r]) for r in range(size) if r != rank]
        self._listeners = [
            threading.Thread(target=self._listen, args=(peer,), name=LISTENER, daemon=True) for peer in self.peers
        ]
        self._monitor = threading.Thread(target=self._guarded_watch, name="heartbeat", daemon=True)
        for thread in (*self._listeners, self._monitor):
            thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """Stop beating; tell the peers that this rank leaves in good order, or that it failed with ``error``.

        In good order it waits, for `GRACE_S` at most, until the peers leave as well: their messages still come here.
        """
        if self._state != "running":
            return
        self._state = "leaving" if error is None else "failed"
        self._why = "" if error is None else f"{type(error).__name__}: {first_line(error)}"
        self._stopping.set()
        self._monitor.join()
        self._send_all()
        end = time.monotonic() + (GRACE_S if error is None else 0.0)
        for listener in self._listeners:
            listener.join(max(0.0, end - time.monotonic()))

    def _listen(self, peer: Peer) -> None:
        """[2] Note every beat of ``peer`` until it leaves, fails or is gone."""
        while True:
            buffer = torch.empty(BEAT_BYTES, dtype=torch.uint8)
            try:
                work = self._group.recv([buffer], peer.rank, 0)
                if work is not None:
                    work.wait(NO_LIMIT)
            except RuntimeError as error:
                if not peer.left:
                    peer.gone = f"is gone ({first_line(error)})"
                return
            before = peer.beat
            try:
                beat = Beat.decode(buffer)
            except Exception as error:  # this thread's end would look like the peer's silence
                peer.gone = f"sent a beat that cannot be read ({type(error).__name__}: {first_line(error)})"
                return
            if beat.state == "failed":
                peer.beat, peer.gone = replace(beat, action=before.action), f"failed: {beat.action}"
                return
            peer.beat, peer.received, peer.heard = beat, time.monotonic(), True
            if beat.state == "leaving":
                return

    def _guarded_watch(self) -> None:
        """End this process if its monitor fails: the peers would take it for silent."""
        try:
            self._watch()
        except Exception as error:
            self._end(f"the heartbeat of {self.name(self.rank)} failed ({type(error).__name__}: {first_line(error)})")

    def _watch(self) -> None:
        """[1], [3]: the body of the monitor thread."""
        last = time.monotonic()
        while not self._stopping.wait(self.interval_s):
            # A process that was itself stopped, or a machine that slept, has not listened: that time is not silence.
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * self.interval_s), now
            for peer in self.peers:
                self._judge(peer, elapsed)
            self._name_who_is_waited_for()
            self._send_all()

    def _judge(self, peer: Peer, elapsed: float) -> None:
        """End this process if ``peer`` was silent for too long, or is gone and waited for."""
        if peer.left:
            return
        if peer.gone:
            peer.gone_s += elapsed
            _, age, waits = self.activity.look()
            # The peer's own failure is to be seen first, and a rank that fails with it has time to say so.
            if peer.gone_s > self.timeout_s or (waits and min(age, peer.gone_s) > GRACE_S):
                self._end(f"{peer} {peer.gone}, last seen {peer.action()}")
            return
        heard, peer.heard = peer.heard, False
        peer.silent_s = 0.0 if heard else peer.silent_s + elapsed
        if peer.silent_s > self.timeout_s / 2 and self._moves_bytes(peer):
            peer.silent_s = self.timeout_s / 2
        if peer.silent_s > self.timeout_s:
            self._end(
                f"{peer} has been silent for {peer.silent_s:.0f} s (--timeout {self.timeout_s:g}), last seen "
                f"{peer.action()}",
                silent=peer,
            )

    def _moves_bytes(self, peer: Peer) -> bool:
        """Return whether bytes have come from the host of ``peer`` since the last call.

        They excuse late beats of the only rank there. Where another rank of that host, or this one, is heard from the
        same addresses, the link is not what is silent.
        """
        addresses = set(peer.about["addresses"])
        others = [p for p in self.peers if p is not peer and not p.left and not p.gone]
        heard = [p.about for p in others if p.silent_s <= 2 * self.interval_s]
        if any(addresses & set(about["addresses"]) for about in (self._own, *heard)):
            return False
        received = bytes_from(addresses, except_port=self._store_port)
        before, peer.bytes_received = peer.bytes_received, received
        return received > before

    def _name_who_is_waited_for(self) -> None:
        """Print, ever more rarely, what the peers do for which the main thread has waited longer than the timeout."""
        action, age, waits = self.activity.look()
        if not waits or age < self.timeout_s:
            self._named_after = self.timeout_s
        elif age >= self._named_after:
            self._named_after = 2 * age
            why = "; ".join(filter(None, map(self._news_of, self.peers))) or "all other ranks wait as well"
            _print(f"mpdqn: {self.name(self.rank)} has been {action} for {age:.0f} s; {why}")

    def _news_of(self, peer: Peer) -> str:
        """Return what ``peer`` does that keeps others waiting; empty if it waits as well."""
        if peer.left or peer.gone:
            return ""
        if peer.silent_s > 3 * self.interval_s:
            return f"{peer} has not answered for {peer.silent_s:.0f} s, last seen {peer.action()}"
        if peer.beat.waits:
            return ""
        return f"{peer} answers and is {peer.action(time.monotonic() - peer.received)}"

    def _send_all(self) -> None:
        """[1] Send a beat, or the last beat of all, to every peer."""
        action, age, waits = self.activity.look()
        for peer in self.peers:
            # Nothing ends a peer whose beats are late while its bytes come, and what it has seen is as late.
            full = peer.sent - peer.beat.seen > MOST_UNSEEN
            if peer.gone or ((peer.left or full) and self._state == "running"):
                continue
            beat = Beat(
                number=peer.sent + 1,
                seen=peer.beat.number,
                state=self._state,  # type: ignore[arg-type]  # one of Beat's three
                role=self.activity.role,
                action=self._why or action,
                age=age,
                waits=waits,
            )
            tensor = beat.encode()
            peer.in_flight = {number: sent for number, sent in peer.in_flight.items() if number > peer.beat.seen}
            try:
                peer.in_flight[beat.number] = self._group.send([tensor], peer.rank, 0), tensor
                peer.sent = beat.number
            except RuntimeError as error:
                peer.gone = f"is gone ({first_line(error)})"

    def name(self, rank: int) -> str:
        """Return ``rank`` with its host and its part in the layout, as messages name it."""
        if rank == self.rank:
            return name_of(rank, self._own, self.activity.role)
        return str(next(peer for peer in self.peers if peer.rank == rank))

    def _end(self, what: str, silent: Peer | None = None) -> None:
        """[3] End this process, because of ``what``, and a ``silent`` peer of the same host with it.

        The report comes first: the launcher looks for it as soon as a rank has ended. Nothing may hold the end up,
        neither a full disk, nor a terminal that takes no more, nor a lock of the main thread.
        """
        if self._stopping.is_set():
            return

        def leave() -> None:
            if silent is not None:
                _kill_here(silent.about, self._own)
            os._exit(2)

        try:
            limit = threading.Timer(ENDING_S, leave)
            limit.daemon = True
            with contextlib.suppress(RuntimeError):  # no thread is to be had
                limit.start()
            action, age, _ = self.activity.look()
            message = f"{what}; {self.name(self.rank)} was {action} (for {age:.0f} s)"
            failure = replace(Failure.of(PeerLost(message)), ended=() if silent is None else (silent.rank,))
            try:
                failure.report(self._pool, self.rank)
            except OSError:
                failure.report(None, self.rank)
            self._state, self._why = "failed", what
            self._send_all()
            for tell in self.on_loss:
                with contextlib.suppress(Exception):
                    tell(message)
            sys.stdout.flush()
        finally:
            leave()


def _print(line: str) -> None:
    """Print ``line`` on standard error, from a thread: one that takes no more would hold the beats up."""

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)

    with contextlib.suppress(RuntimeError):  # no thread is to be had: the line is not worth more
        threading.Thread(target=write, name="notice", daemon=True).start()


def _about() -> dict[str, Any]:
    """Return this process as its peers should know it.

    ``host_id`` is that of the kernel and of the namespaces in which process numbers and addresses mean the same.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    return {
        "host": socket.gethostname(),
        "addresses": own_addresses(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "host_id": " ".join([boot, *spaces]),
    }


def _kill_here(about: dict[str, Any], own: dict[str, Any]) -> None:
    """Kill a process of this machine that no longer answers: nothing gentler would reach it."""
    if about["host_id"] == own["host_id"] and about["started"] == started(about["pid"]) != "":
        with contextlib.suppress(OSError):
            os.kill(about["pid"], signal.SIGKILL)
