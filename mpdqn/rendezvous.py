"""The start of a world: every rank finds the others, or says within the timeout which one it missed.

    store  ◀── rank 0 is here      [1] the store: a file in the pool's own folder, or what the launcher names
           ◀── rank 1 is here      [2] meet in a new part of it, and wait for every rank there
    gloo / NCCL: addresses         [3] torch's default process group

Each step happens in a thread, because torch's client of a TCP store waits without limit for a server that accepts a
connection and then says nothing.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, but not in its __all__
    FileStore,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from mpdqn.failures import PeerLost, first_line

T = TypeVar("T")

LOOK_S = 0.01
"""Seconds between two looks of rank 0 at who asks."""

MARGIN_S = 5.0
"""Seconds beyond the timeout after which a step that should have ended by itself is given up."""


def join(backend: str, rank: int, size: int, timeout_s: float, folder: Path | None) -> Store:
    """Make torch's default process group of ``size`` ranks and return its store. Collective.

    Args:
        backend: ``gloo`` or ``nccl``.
        rank: this rank.
        size: how many ranks there are.
        timeout_s: seconds for which a rank waits for the others to start.
        folder: the pool's own folder, in which the ranks meet in a file; None for the launcher's rendezvous.

    Raises:
        PeerLost: if the rendezvous does not answer, or a rank does not come, naming which.
    """
    if size == 1:
        alone = HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        return alone
    limit = timedelta(seconds=timeout_s)
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}" if folder is None else "a file"

    problem = f"rank {rank} of {size} could not join the others through the rendezvous at {where}"
    store = attempt(problem, timeout_s, lambda: _store(rank, size, limit, folder))  # [1]
    own = attempt(problem, timeout_s, lambda: _meet(store, rank, size, timeout_s))  # [2]
    attempt(  # [3]
        problem,
        timeout_s,
        lambda: dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit),
    )
    return own


def _store(rank: int, size: int, limit: timedelta, folder: Path | None) -> Store:
    """Return the store that the launcher names, or a file in the pool's ``folder``."""
    if folder is not None:
        store: Store = FileStore(str(folder / "store"))
        store.set_timeout(limit)
    else:
        # As torch's env:// rendezvous, but without its waiting for all ranks, which would not say who is missing.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if host is None or port is None:
            raise ValueError(f"RANK is set but MASTER_ADDR is {host} and MASTER_PORT is {port}; use torchrun")
        store = TCPStore(
            host,
            int(port),
            size,
            is_master=rank == 0 and not served,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    return store


def _meet(store: Store, rank: int, size: int, timeout_s: float) -> Store:
    """Wait until every rank is here and return a part of the ``store`` that is this world's alone.

    A launcher that restarts ranks keeps the store, with what the dead ones left in it. So each rank asks under a name
    that nobody had before, rank 0 answers with the name of the new world, and only who is alive comes to it:

        rank 1  hello/1 = 5f…  ──▶  rank 0  reply/5f… = world a3…  ──▶  rank 1  a3…/here/1     every rank waits for all
    """
    end = time.monotonic() + timeout_s
    others = [r for r in range(size) if r != rank]
    if rank == 0:
        world = PrefixStore(f"mpdqn/world-{(name := uuid.uuid4().hex)}", store)
        world.set("here/0", "1")
        missing = _answer(store, world, name, others, end)
    else:
        ticket = uuid.uuid4().hex
        store.set(f"mpdqn/hello-{rank}", ticket)
        try:
            store.wait([f"mpdqn/reply-{ticket}"], timedelta(seconds=timeout_s))
        except RuntimeError:
            raise _missing(rank, size, [0], timeout_s) from None
        world = PrefixStore(f"mpdqn/world-{store.get(f'mpdqn/reply-{ticket}').decode()}", store)
        world.set(f"here/{rank}", "1")
        missing = _not_there(world, others, end)
    if missing:
        raise _missing(rank, size, missing, timeout_s)
    return world


def _answer(store: Store, world: Store, name: str, others: list[int], end: float) -> list[int]:
    """Tell every rank that asks the ``name`` of the ``world`` until all are there; return those that did not come.

    What a dead rank has asked is answered too, until the one in its place asks.
    """
    missing = list(others)
    while missing and time.monotonic() < end:
        for other in missing:
            if store.check([f"mpdqn/hello-{other}"]):
                store.set(f"mpdqn/reply-{store.get(f'mpdqn/hello-{other}').decode()}", name)
        missing = [other for other in missing if not world.check([f"here/{other}"])]
        time.sleep(LOOK_S if missing else 0.0)
    return missing


def _not_there(world: Store, others: list[int], end: float) -> list[int]:
    """Wait for all ``others`` until ``end``; return those that did not come."""
    missing: list[int] = []
    for other in others:
        try:
            world.wait([f"here/{other}"], timedelta(seconds=max(0.001, end - time.monotonic())))
        except RuntimeError as error:
            if missing and "timeout" not in str(error).lower():  # the store went with a rank that gave up earlier
                break
            missing.append(other)
    return missing


def _missing(rank: int, size: int, missing: list[int], timeout_s: float) -> PeerLost:
    """Return the error that names the ranks that did not come."""
    names = ", ".join(map(str, missing))
    return PeerLost(
        f"rank {rank} waited {timeout_s:g} s (--timeout) for rank {names} of {size} to start; look at its output, "
        "or raise --timeout where starting takes longer"
    )


def attempt(problem: str, timeout_s: float, function: Callable[[], T]) -> T:
    """Return what ``function`` returns; it is called in a thread.

    Raises:
        PeerLost: if it fails, or does not end some seconds after the timeout; its thread is left behind then. The
            message begins with ``problem``. torch's own bring a C++ stack along, of which the first line is kept.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout_s + MARGIN_S)
    for error in failures:
        if isinstance(error, PeerLost) or not isinstance(error, (RuntimeError, ValueError)):
            raise error
        raise PeerLost(f"{problem}: {first_line(error)}") from None
    if not results:
        raise PeerLost(f"{problem}: no answer within {timeout_s + MARGIN_S:g} s; look at what listens there")
    return results[0]
