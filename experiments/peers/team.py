"""`Team`: a contender of one or more ranks, each in a process of its own.

    parent ─┬─ n ─▶ rank 0  n updates ─┬─▶ seconds, losses      the rate is n / the slowest rank's seconds
            └─ n ─▶ rank 1  n updates ─┘

How many updates a turn has is settled before it begins, so that the ranks run freely: a message between updates would
hold up a rank that may be ahead. Between turns the ranks are stopped (SIGSTOP): gloo's threads would go on looking for
messages a hundred times a second each, which for all idle contenders together is a tenth of a core.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch.distributed as dist

from experiments.peers.task import Step
from mpdqn.bench.harness import Isolated
from mpdqn.cores import pin
from mpdqn.forkserver import RANK_NAME, forked

SILENCE_S = 600.0
"""How long a rank may take for its start or a turn before it counts as hanging."""


class TeamFailed(RuntimeError):
    """A rank could not do its part. The message is one line: its error; a note has the traceback."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    seconds: float
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class _Failure:
    error: str
    trace: str


class Team(Isolated):
    """An `Isolated` contender of ``ranks`` processes; they find each other as under torchrun, by the environment."""

    def __init__(self, make: Callable[[], Step], *, ranks: int, threads: int) -> None:
        """Start the processes; ``make`` is called in each and returns its update. It must be picklable.

        Rank r has ``threads`` threads, pinned to its own share of the cores.
        """
        # The parent holds the store, as torchrun's agent does: a port that was merely found free may be taken again.
        # It is given a socket that listens on the loopback interface; one of its own would listen on all of them.
        listener = socket.create_server(("127.0.0.1", 0))
        make_store = dist.TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__
        self._store = make_store(
            "127.0.0.1",
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            pipe, theirs = multiprocessing.Pipe()
            process = forked(_take_turns, make, environment, threads, rank, theirs, name=f"{RANK_NAME}{rank}")
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def updates(self, count: int) -> tuple[float, list[float]]:
        """Make ``count`` updates on every rank.

        Returns:
            the seconds of the slowest rank, and the loss of the whole batch in each update.

        Raises:
            TeamFailed: if a rank fails, ends or hangs; all of them have ended by then.
        """
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):  # it has failed: its last message says why
            for pipe in self._pipes:
                pipe.send(count)
        turns = self._answers()
        self._signal(signal.SIGSTOP)
        return max(turn.seconds for turn in turns), [
            sum(parts) for parts in zip(*(t.losses for t in turns), strict=True)
        ]

    def rate(self, seconds: float) -> float:
        """Updates per second in a turn of about ``seconds``, and at least two updates, after one to warm up."""
        warm, _ = self.updates(1)
        count = max(2, math.ceil(seconds / warm))
        taken, _ = self.updates(count)
        return count / taken

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            if process.is_alive():
                process.kill()  # it may be stopped, or handle a gentler signal by waiting for a peer that is gone
        for process in self._processes:
            process.join()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def _answers(self) -> list[_Turn]:
        turns: dict[int, _Turn] = {}
        deadline = time.monotonic() + SILENCE_S
        while waiting := [pipe for rank, pipe in enumerate(self._pipes) if rank not in turns]:
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = [self._pipes.index(pipe) for pipe in waiting]
                raise self._failed(f"no answer of ranks {ranks} within {SILENCE_S:.0f} s", "")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(10)
                    raise self._failed(f"rank {rank} ended with code {self._processes[rank].exitcode}", "") from None
                if isinstance(answer, _Failure):
                    raise self._failed(answer.error, f"On rank {rank}:\n{answer.trace}")
                turns[rank] = answer
        return [turns[rank] for rank in range(len(self._pipes))]

    def _failed(self, error: str, trace: str) -> TeamFailed:
        self.close()
        failed = TeamFailed(error)
        failed.add_note(trace)
        return failed


def _take_turns(
    make: Callable[[], Step], environment: dict[str, str], threads: int, rank: int, pipe: Connection
) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # what the peers print is no part of the table
    pin(sorted(os.sched_getaffinity(0)), threads, rank)
    try:
        step = make()
        while True:
            count = pipe.recv()
            begin = time.perf_counter()
            losses = [step() for _ in range(count)]
            seconds = time.perf_counter() - begin
            pipe.send(_Turn(seconds=seconds, losses=[0.0 if loss is None else float(loss) for loss in losses]))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except BaseException as error:
        first = (str(error).strip().splitlines() or [""])[0]
        pipe.send(_Failure(error=f"{type(error).__name__}: {first}", trace=traceback.format_exc()))
