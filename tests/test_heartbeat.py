"""Silence ends every rank within the timeout, whatever it is doing; work, however long, ends none.

Each phase of a run has its fault: a rank that is stopped (SIGSTOP) there, and one whose link goes down.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mpdqn import heartbeat, mesh
from mpdqn.actors import Actors
from mpdqn.beat import BEAT_BYTES, Activity, Beat, Peer
from mpdqn.bench.config import CompareConfig
from mpdqn.bench.config import check as check_compare
from mpdqn.bench.trial import Trials, run_trials
from mpdqn.checkpoint import saver
from mpdqn.failures import POOL_FOLDER, Failure
from mpdqn.heartbeat import Heartbeat
from mpdqn.mesh import World
from mpdqn.pipeline.runtime import Pipeline
from mpdqn.traffic import bytes_from, own_addresses
from mpdqn.train import session
from mpdqn.train.batches import BatchQueue
from mpdqn.train.check import check
from mpdqn.train.run import train_rank
from tests.train.settings import small
from tests.worlds import Ranks, TwoHosts, ranks

pytestmark = [pytest.mark.pool, pytest.mark.waits]

TIMEOUT_S = 5.0
END_S = TIMEOUT_S + 10.0
"""Until every rank has ended after a fault, as docs/training.md promises."""
START_S = 120.0

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and the ip command"
)


class Fault:
    """What happens to rank ``rank`` when it comes to ``phase`` for the ``time``-th time."""

    def __init__(self, phase: str, rank: int, kind: str, folder: Path) -> None:
        self.phase, self.rank, self.kind, self.folder = phase, rank, kind, folder

    def arm(self, target: Any, name: str, time: int = 2) -> None:
        """Let the fault happen in the ``time``-th call of ``target.name`` on the fault's rank."""
        if os.environ["RANK"] != str(self.rank):
            return
        real, calls = getattr(target, name), 0

        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == time:
                self.happen()
            return real(*args, **options)

        patch.object(target, name, call).start()

    def happen(self) -> None:
        (self.folder / "reached").write_text(str(time.time()))
        if self.kind == "stop":
            time.sleep(0.25 * TIMEOUT_S)  # until its beats have told what it is doing
            os.kill(os.getpid(), signal.SIGSTOP)
        else:  # the link is cut from outside, while this rank is busy with something that takes long
            time.sleep(120)


TRAINING = {
    "playing": (Actors, "play", "playing round"),
    "drawing": (BatchQueue, "batches", "drawing the batch of update"),
    "learning": (Pipeline, "_forward", r"computing \d[TDF]\d"),
    "evaluating": (session, "evaluate", "evaluating"),
    "checkpointing": (
        saver,
        "save",
        "starting a checkpoint|playing|waiting|drawing|learning|computing|finishing|writing",
    ),
}


def train_until(fault: Fault, out: Path) -> None:
    torch.set_num_threads(1)
    layout = "pp2-1f1b/m2" if fault.phase in ("learning", "evaluating") else "dp2"
    config = small(
        out,
        layout=layout,
        frames=4_000,
        timeout=TIMEOUT_S,
        evaluate_every=700,
        evaluation_episodes=1 if fault.phase == "evaluating" else 0,
        checkpoint_every=600 if fault.phase == "checkpointing" else 0,
    )
    target, name, _ = TRAINING[fault.phase]
    fault.arm(target, name, time=1 if fault.phase in ("evaluating", "checkpointing") else 2)
    train_rank(check(config))


def compare_until(fault: Fault, out: Path) -> None:
    config = CompareConfig(
        env="minatar-breakout", network="minatar", layouts=("single@1", "dp2"), smoke=True, transitions=64,
        batch_size=8, out=out, timeout=TIMEOUT_S,
    )  # fmt: skip
    fault.arm(Trials, "_trial", time=2)
    run_trials(check_compare(config))


def start_until(fault: Fault, out: Path) -> None:
    fault.arm(World, "open", time=1)
    with World.open(timeout_s=TIMEOUT_S) as world:
        world.barrier()


PHASES: dict[str, tuple[Callable[[Fault, Path], None], int, str]] = {
    **{phase: (train_until, 0 if phase == "evaluating" else 1, seen) for phase, (_, _, seen) in TRAINING.items()},
    "between layouts": (compare_until, 1, "measuring dp2"),
}


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    made = TwoHosts()
    yield made
    made.close()


@dataclass
class Run:
    """Two ranks of which one comes to a fault."""

    folder: Path
    ranks: Ranks
    hosts: TwoHosts | None

    def close(self) -> None:
        self.ranks.close()
        if self.hosts is not None:
            self.hosts.close()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """A run for every phase, with faults of one kind; all at once, as most of the time they wait."""
    started: dict[str, Run] = {}
    for phase, (function, rank, _) in PHASES.items():
        folder = tmp_path_factory.mktemp(phase.replace(" ", "-"))
        hosts = TwoHosts() if request.param == "cut" else None
        fault = Fault(phase, rank, request.param, folder)
        both = Ranks(function, fault, folder / "out", num_ranks=2, folder=folder, hosts=hosts)
        started[phase] = Run(folder, both, hosts)
    yield started
    for run in started.values():
        run.close()


def wait_until_reached(folder: Path) -> float:
    deadline = time.monotonic() + START_S
    while not (folder / "reached").exists() or not (folder / "reached").read_text():
        assert time.monotonic() < deadline, [p.read_text() for p in folder.glob("rank-*")]
        time.sleep(0.05)
    return float((folder / "reached").read_text())


def wait_for_files(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + START_S
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, [p.read_text() for p in folder.glob("rank-*")]
        time.sleep(0.05)


@pytest.mark.parametrize("runs", ["stop"], indirect=True)
@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_rank_ends_all_and_is_named(phase: str, runs: dict[str, Run]) -> None:
    (function, rank, seen), run = PHASES[phase], runs[phase]
    begin = wait_until_reached(run.folder)
    ended = run.ranks.wait(START_S)
    message = run.ranks.said(1 - rank)
    assert max(ended.values()) - begin < END_S, message
    assert run.ranks.processes[rank].exitcode == -signal.SIGKILL  # it no longer answered, and was ended at once
    stage = r"stages \(1,\)" if rank == 1 and phase == "learning" else r"stages \(0,\)"
    pattern = (
        rf"mpdqn: rank {rank} \(host {os.uname().nodename}, {stage}\) has been silent for \d s \(--timeout 5\), "
        rf"last seen ({seen}).* \(for \d s\); rank {1 - rank} \(host .*, stages .*\) was .+ \(for \d+ s\)\n"
    )
    assert re.search(pattern, message), message
    if rank == 1 and function is train_until:  # rank 0 has told the run's folder
        (status,) = (run.folder / "out").glob("*/status.json")
        assert f"PeerLost: rank {rank}" in status.read_text()


@needs_hosts
@pytest.mark.parametrize("runs", ["cut"], indirect=True)
@pytest.mark.parametrize("phase", PHASES)
def test_a_cut_link_ends_both_sides(phase: str, runs: dict[str, Run]) -> None:
    run = runs[phase]
    assert run.hosts is not None
    wait_until_reached(run.folder)
    run.hosts.cut()
    begin = time.time()
    ended = run.ranks.wait(START_S)
    for rank in (0, 1):
        said = run.ranks.said(rank)
        assert ended[rank] - begin < END_S, said
        assert re.search(rf"mpdqn: rank {1 - rank} \(host .*\) has been silent for \d s", said), said


def test_a_rank_that_does_not_start_is_named(tmp_path: Path) -> None:
    fault = Fault("start-up", 1, "stop", tmp_path)
    with ranks(start_until, fault, tmp_path, num_ranks=3, folder=tmp_path) as world:
        begin = wait_until_reached(tmp_path)
        while len(world._ended) < 2:
            assert time.time() < begin + END_S
            time.sleep(0.05)
        for rank in (0, 2):
            assert f"rank {rank} waited 5 s (--timeout) for rank 1 of 3 to start" in world.said(rank)


def start() -> None:
    with World.open(timeout_s=TIMEOUT_S) as world:
        world.barrier()


@needs_hosts
def test_a_link_that_is_cut_at_the_start_ends_both_sides(tmp_path: Path, hosts: TwoHosts) -> None:
    hosts.cut()
    begin = time.time()
    with ranks(start, num_ranks=2, folder=tmp_path, hosts=hosts) as world:
        ended = world.wait(START_S)
        assert max(ended.values()) - begin < END_S + 5, "the limit, and the start of two processes"
        assert "rank 0 waited 5 s (--timeout) for rank 1 of 2 to start" in world.said(0)
        assert re.search(r"PeerLost: rank 1 of 2 could not join the others .* at 10\.77\.0\.1:\d+: ", world.said(1))


def stop_after_the_roll_call(folder: Path) -> None:
    """Rank 1 stops when all ranks are there, but before any beat."""
    if os.environ["RANK"] == "1":
        Fault("start-up", 1, "stop", folder).arm(mesh, "attempt", time=1)
    start()


def test_a_rank_that_stops_between_the_roll_call_and_the_first_beat_is_noticed(tmp_path: Path) -> None:
    with ranks(stop_after_the_roll_call, tmp_path, num_ranks=2, folder=tmp_path) as world:
        begin = wait_until_reached(tmp_path)
        while 0 not in world._ended:
            assert time.time() < begin + END_S
            time.sleep(0.05)
        line = world.said(0).splitlines()[-1]
        assert line.startswith("PeerLost: rank 0 of 2 could not connect to the other ranks: "), line


# Work is not silence


def keep_busy(seconds: float) -> None:
    """Rank 1's main thread does something else for a long time, then all is well."""
    with World.open(timeout_s=3.0) as world:
        group = world.message_group("F")
        world.barrier()
        buffer = torch.zeros(3)
        if world.rank == 1:
            world.activity.set("compiling")
            time.sleep(seconds)
            world.send(torch.ones(3), 0, group, "F").wait()
        else:
            world.receive(buffer, 1, group, "F").wait()
            assert buffer.tolist() == [1, 1, 1]


def test_a_busy_rank_is_waited_for_and_named(tmp_path: Path) -> None:
    with ranks(keep_busy, 6.0, num_ranks=2, folder=tmp_path) as world:
        world.wait(START_S)
        assert [p.exitcode for p in world.processes] == [0, 0], world.said(0) + world.said(1)
        assert re.search(
            r"mpdqn: rank 0 \(host .*\) has been waiting for F from rank 1 for \d s; rank 1 \(host .*\) answers and is "
            r"compiling \(for \d s\)\n",
            world.said(0),
        )


def send_slowly(beats: bool) -> None:
    """A message that takes far longer than the timeout over a slow link, on which beats may all be late."""
    with World.open(timeout_s=4.0) as world:
        group = world.message_group("F")
        world.barrier()
        data = torch.arange(150_000, dtype=torch.float32)  # 600 kB, 9 s at 512 kbit/s
        if world.rank == 1:
            own = world.heartbeat
            assert own is not None
            with contextlib.nullcontext() if beats else patch.object(own, "_send_all"):
                world.send(data, 0, group, "F").wait()
        else:
            buffer, begin = torch.zeros_like(data), time.monotonic()
            world.receive(buffer, 1, group, "F").wait()
            assert torch.equal(buffer, data)
            assert time.monotonic() - begin > 2 * 4.0
        world.barrier()


@needs_hosts
@pytest.mark.skipif(shutil.which("tc") is None, reason="a slow link needs the tc command")
@pytest.mark.parametrize("beats", [True, False], ids=["beats-come", "bytes-come"])
def test_a_slow_link_is_waited_for(tmp_path: Path, hosts: TwoHosts, beats: bool) -> None:
    hosts.slow("512kbit")
    with ranks(send_slowly, beats, num_ranks=2, folder=tmp_path, hosts=hosts) as world:
        world.wait(START_S)
        assert [p.exitcode for p in world.processes] == [0, 0], world.said(0) + world.said(1)


def test_looking_at_the_traffic_leaves_nothing_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(10):
        bytes_from(["10.77.0.1"])
        own_addresses()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_bytes_are_counted_by_address_and_not_from_the_store() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            port, before = server.getsockname()[1], bytes_from(["127.0.0.1"])
            other.sendall(bytes(1_000))
            assert len(one.recv(1_000, socket.MSG_WAITALL)) == 1_000
            assert bytes_from(["127.0.0.1"]) - before == 1_000
            assert bytes_from(["127.0.0.1"], except_port=port) <= before
            assert bytes_from(["10.77.0.1"]) == 0


def all_stopped(folder: Path) -> None:
    """Both ranks are stopped for longer than the timeout, as by Ctrl-Z or a laptop's lid."""
    with World.open(timeout_s=4.0) as world:
        world.barrier()
        (folder / f"ready-{world.rank}").touch()
        while not (folder / "awake").exists():
            time.sleep(0.05)
        time.sleep(2)  # the monitors have looked at the time since
        world.barrier()


def test_time_in_which_this_rank_itself_was_stopped_is_not_silence(tmp_path: Path) -> None:
    with ranks(all_stopped, tmp_path, num_ranks=2, folder=tmp_path) as world:
        wait_for_files(tmp_path, "ready-0", "ready-1")
        for wake in (signal.SIGSTOP, signal.SIGCONT):
            for process in world.processes:
                assert process.pid is not None
                os.kill(process.pid, wake)
            time.sleep(6.0 if wake == signal.SIGSTOP else 0)
        (tmp_path / "awake").touch()
        world.wait(START_S)
        assert [p.exitcode for p in world.processes] == [0, 0], world.said(0) + world.said(1)


# Failures that are not silence


def fail_on_one() -> None:
    """Rank 1 fails, rank 0 waits for rank 2, which computes on."""
    with World.open(timeout_s=60) as world:
        group = world.message_group("F")
        world.barrier()
        if world.rank == 1:
            raise ZeroDivisionError("the cause,\nin two lines")
        if world.rank == 2:
            time.sleep(30)
        world.receive(torch.zeros(1), 2, group, "F").wait()


def test_a_failed_rank_ends_those_that_wait_for_another(tmp_path: Path) -> None:
    begin = time.monotonic()
    with ranks(fail_on_one, num_ranks=3, folder=tmp_path) as world:
        while 0 not in world._ended:
            assert time.monotonic() < begin + 60
            time.sleep(0.05)
        assert "ZeroDivisionError: the cause,\nin two lines" in world.said(1)
        assert re.search(
            r"mpdqn: rank 1 \(host .*\) failed: ZeroDivisionError: the cause,, last seen .*; rank 0 \(host .*\) was "
            r"waiting for F from rank 2 \(for \d s\)\n",
            world.said(0),
        ), world.said(0)


def leave_early() -> None:
    """Rank 1 ends in good order, without closing its world, long before rank 0."""
    world = World.open(timeout_s=3.0)
    world.barrier()
    if world.rank == 1:
        world._say_goodbye()
        return
    time.sleep(8)


def test_a_rank_that_left_in_good_order_is_not_lost(tmp_path: Path) -> None:
    with ranks(leave_early, num_ranks=2, folder=tmp_path) as world:
        world.wait(START_S)
        assert [p.exitcode for p in world.processes] == [0, 0], world.said(0)


def close_one_after_the_other() -> None:
    world = World.open(timeout_s=60)
    world.barrier()
    time.sleep(world.rank)  # rank 0 leaves first, and waits for rank 1's answer
    begin = time.monotonic()
    world.close()
    print(f"closed in {time.monotonic() - begin:.1f} s", file=sys.stderr)
    time.sleep(4)


def test_who_leaves_first_hears_from_who_leaves_last(tmp_path: Path) -> None:
    with ranks(close_one_after_the_other, num_ranks=2, folder=tmp_path) as world:
        world.wait(START_S)
        seconds = [float(world.said(rank).split()[2]) for rank in (0, 1)]
    assert seconds[0] < 2.5
    assert seconds[1] < 1.0


# What may not hold the end up


def fail_to_report(folder: Path) -> None:
    """Rank 1 is stopped; rank 0, of a pool whose folder is full, still ends."""
    POOL_FOLDER.set(folder)

    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(Failure, "write", write), World.open(timeout_s=4.0) as world:
        world.barrier()
        if world.rank == 1:
            (folder / "reached").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)
        world.barrier()


def test_a_report_that_cannot_be_written_ends_the_rank_all_the_same(tmp_path: Path) -> None:
    with ranks(fail_to_report, tmp_path, num_ranks=2, folder=tmp_path) as world:
        begin = wait_until_reached(tmp_path)
        ended = world.wait(START_S)
        assert max(ended.values()) - begin < 4 + 10
        assert [p.exitcode for p in world.processes] == [2, -signal.SIGKILL]
        assert re.search(r"mpdqn: rank 1 \(host .*\) has been silent for \d s", world.said(0))


def block_the_terminal() -> None:
    """Rank 0's standard error takes no more, and rank 1 keeps it waiting; both are well."""
    with World.open(timeout_s=3.0) as world:
        world.barrier()
        if world.rank == 0:
            _, full = os.pipe()
            os.set_blocking(full, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(full, bytes(65_536))
            os.set_blocking(full, True)
            os.dup2(full, 2)
            world.barrier()
            os._exit(0)
        time.sleep(9)
        world.barrier()


def test_a_terminal_that_takes_no_more_does_not_hold_up_the_beats(tmp_path: Path) -> None:
    with ranks(block_the_terminal, num_ranks=2, folder=tmp_path) as world:
        world.wait(START_S)
        assert [p.exitcode for p in world.processes] == [0, 0], world.said(1)


# The parts


def test_a_beat_is_cut_to_its_size() -> None:
    beat = Beat(number=3, seen=2, role="stages (0,)", action="ä" * 5_000, age=1.5, waits=True)
    sent = beat.encode()
    assert (sent.shape, sent.dtype) == ((BEAT_BYTES,), torch.uint8)
    back = Beat.decode(sent)
    assert (back.number, back.seen, back.role, back.age, back.waits) == (3, 2, "stages (0,)", 1.5, True)
    assert back.action.startswith("äää")


class Saying:
    """A process group from which ``sent`` is received."""

    def __init__(self, sent: bytes) -> None:
        self._sent = torch.frombuffer(bytearray(sent.ljust(BEAT_BYTES)), dtype=torch.uint8)

    def recv(self, buffers: list[torch.Tensor], rank: int, tag: int) -> None:
        buffers[0].copy_(self._sent)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\xff", "UnicodeDecodeError: "),
        (b"{", "JSONDecodeError: Expecting property name"),
        (b"[]", "TypeError: "),
        (b'{"number": 1, "seen": 1, "mood": "good"}', "TypeError: .* unexpected keyword argument 'mood'"),
    ],
)
def test_a_beat_that_cannot_be_read_is_told(sent: bytes, why: str) -> None:
    """It ended the listening thread, and after a while the peer was called silent."""
    one, peer = object.__new__(Heartbeat), Peer(rank=1, about={})
    one._group = Saying(sent)  # type: ignore[assignment]
    one._listen(peer)
    assert re.fullmatch(rf"sent a beat that cannot be read \({why}.*\)", peer.gone)


@pytest.mark.parametrize(
    ("beside", "excused"),
    [
        (None, True),
        ({"addresses": ["10.0.0.2"], "silent_s": 0.0}, False),  # its bytes come, so the link is not what is silent
        ({"addresses": ["10.0.0.2"], "silent_s": 3.0}, True),
        ({"addresses": ["10.0.0.2"], "silent_s": 0.0, "left": True}, True),
        ({"addresses": ["10.0.0.3"], "silent_s": 0.0}, True),
        ({"addresses": ["10.0.0.1"], "silent_s": 9.0, "own": True}, False),  # the silent rank is of this host
    ],
)
def test_bytes_excuse_late_beats_of_the_only_rank_there(
    beside: dict[str, Any] | None, excused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = iter(range(1, 100))
    monkeypatch.setattr(heartbeat, "bytes_from", lambda addresses, except_port: next(received))
    one = object.__new__(Heartbeat)
    one.interval_s, one._store_port, one._own = 1.0, 0, {"addresses": ["10.0.0.1"]}
    silent = Peer(rank=1, about={"addresses": ["10.0.0.2"]}, silent_s=9.0)
    one.peers = [silent]
    if beside is not None and beside.get("own"):
        silent.about = {"addresses": ["10.0.0.1"]}
    elif beside is not None:
        other = Peer(rank=2, about={"addresses": beside["addresses"]}, silent_s=beside["silent_s"])
        other.beat = Beat(number=1, seen=1, state="leaving" if beside.get("left") else "running")
        one.peers.append(other)
    assert one._moves_bytes(silent) is excused


def test_an_activity_returns_to_what_was_done_before() -> None:
    activity = Activity()
    activity.set("playing round 3")
    with activity.waiting("waiting for F from rank 1"):
        assert activity.look()[0::2] == ("waiting for F from rank 1", True)
    assert activity.look()[0::2] == ("playing round 3", False)
    with pytest.raises(ZeroDivisionError), activity.waiting("waiting for B"):
        raise ZeroDivisionError
    assert activity.look()[0::2] == ("waiting for B", True)  # what the failure is about
