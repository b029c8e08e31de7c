"""The worker pool with real processes and real signals: results, the first cause, and nothing left behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mpdqn.failures import PeerLost
from mpdqn.launch import WorkerError, launch
from mpdqn.mesh import Mesh, World
from mpdqn.plan import Parallelism, Partition, Plan
from tests.distributed import run_ranks
from tests.processes import END_S, ROOT, assert_nothing_left, processes_of, wait_for, workers_of

pytestmark = [pytest.mark.pool, pytest.mark.waits]

START_S = 120.0
"""Until workers must be there, on a machine with other work to do."""


def end_processes(folder: Path) -> None:
    """Whatever a test has found, leave nothing behind."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_child(folder: Path) -> None:
    """A process of the worker's own, which would outlive it by far."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(folder)])


def pipeline_of_two(world: World) -> Mesh:
    return Mesh(world, Plan.rectangular(Partition(boundaries=(0, 1, 2)), Parallelism(pipeline=2)), "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own, in which `launch` puts its job, so that the workers' command lines name it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    end_processes(tmp_path)


# Results


def test_results_come_by_rank_and_the_process_is_as_it_was(folder: Path):
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers, environment = [signal.getsignal(s) for s in handled], dict(os.environ)
    factor = 10

    class Local:
        """Neither this class nor the lambda can be imported by a worker."""

        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    def name_and_ranks(base: torch.Tensor) -> tuple[Any, ...]:
        with World.open() as world:
            world.barrier()
            # As for a function of __main__: pickled by value, the closure with it.
            return Local(factor * base + world.rank), world.rank, world.size, os.getpid()

    results = launch(name_and_ranks, torch.tensor([1.0, 2.0]), num_workers=2)
    assert [r[0].value.tolist() for r in results] == [[10.0, 20.0], [11.0, 21.0]]
    assert [r[1:3] for r in results] == [(0, 2), (1, 2)]
    assert len({os.getpid(), *(r[3] for r in results)}) == 3
    assert_nothing_left(folder)
    assert [signal.getsignal(s) for s in handled] == handlers
    assert dict(os.environ) == environment


def test_a_lambda_in_a_script_runs_as_it_does_under_the_guard(folder: Path):
    code = "from mpdqn.launch import launch\nk = 7\nprint(launch(lambda x: [x * k], 6, num_workers=1))"
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert (done.returncode, done.stdout) == (0, "[[42]]\n"), done.stderr
    assert done.stderr == ""
    assert_nothing_left(folder)


# Failures


def raise_after_silence(folder: Path) -> None:
    world = World.open()
    pipeline_of_two(world)
    start_child(folder)
    world.barrier()
    if world.rank == 0:
        raise PeerLost("before rank 1 says what is the matter")
    time.sleep(1.5)
    raise ZeroDivisionError("the cause,\nin two lines")


def test_a_workers_own_error_is_raised_though_its_peer_failed_first(folder: Path):
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        launch(raise_after_silence, folder, num_workers=2)
    assert str(caught.value) == "rank 1 of 2 failed: ZeroDivisionError: the cause,\nin two lines"
    notes = "".join(caught.value.__notes__)
    assert "On rank 1:\nTraceback (most recent call last)" in notes
    assert 'raise ZeroDivisionError("the cause' in notes
    assert caught.value.__suppress_context__
    assert time.monotonic() - start < START_S + END_S
    assert_nothing_left(folder)


def kill_in_communication(folder: Path) -> None:
    world = World.open()
    mesh = pipeline_of_two(world)
    start_child(folder)
    world.barrier()
    if world.rank == 0:
        # The agent ends this rank with SIGTERM as soon as it sees the other gone; hold out until the message tells.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            mesh.receive(torch.zeros(3), 1, "F").wait()
        except PeerLost as error:
            (folder / "lost").write_text(str(error))
            raise
    mesh.send(torch.zeros(4_000_000), 0, "B")  # nobody receives it
    (folder / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named_with_its_signal(folder: Path):
    with pytest.raises(WorkerError) as caught:
        launch(kill_in_communication, folder, num_workers=2)
    seconds = time.time() - float((folder / "killed").read_text())
    assert str(caught.value) == "rank 1 of 2 failed: killed by SIGKILL"
    assert "stages (0,)) lost a peer while waiting for F from rank 1: " in (folder / "lost").read_text()
    assert seconds < END_S
    assert_nothing_left(folder)


def test_a_worker_that_leaves_without_a_word_is_named_with_its_exit_code(folder: Path):
    with pytest.raises(WorkerError, match=r"^rank 0 of 1 failed: exited with code 3$"):
        launch(os._exit, 3, num_workers=1)
    assert_nothing_left(folder)


def test_ranks_that_do_not_end_are_ended(folder: Path):
    with pytest.raises(TimeoutError, match="1 ranks did not end within 4 s"):
        run_ranks(time.sleep, 600, num_ranks=1, timeout=4)
    assert_nothing_left(folder)


def stop_after_leaving() -> int:
    with World.open(timeout_s=60) as world:
        world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return world.rank


def test_a_worker_that_is_stopped_after_it_left_its_world_is_named_and_ended(folder: Path):
    """No peer listens to it any more, and the launcher waits for its end without a limit."""
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 failed: stopped \(SIGSTOP\) for \d+ s, and killed$"):
        launch(stop_after_leaving, num_workers=2, timeout_s=1)
    assert_nothing_left(folder)


# Sockets


def listen_as_always(folder: Path) -> None:
    with World.open() as world:
        pipeline_of_two(world)
        world.barrier()
        (folder / f"ready-{world.rank}").touch()
        wait_for((folder / "seen").exists, START_S, "look at the sockets")


def listening() -> set[tuple[str, int, int]]:
    """Address, port and inode of every TCP socket of this host that listens; addresses as hexadecimal numbers."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == "0A":  # TCP_LISTEN
                address, port = local.split(":")
                found.add((address, int(port, 16), int(fields[9])))
    return found


def inodes_of(pid: int) -> set[int]:
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_a_pool_listens_on_the_loopback_interface_alone_and_its_rendezvous_not_at_all(folder: Path):
    already = inodes_of(os.getpid())  # of worlds that earlier tests opened in this process
    with ThreadPoolExecutor(1) as thread:
        # Not in the main thread: the agent is then a thread of this process, which can look at its own sockets.
        pool = thread.submit(launch, listen_as_always, folder, num_workers=2)
        try:
            wait_for(lambda: pool.done() or len(list(folder.glob("ready-*"))) == 2, START_S, "workers")
            workers, before = workers_of(folder).values(), listening()
            parents = inodes_of(os.getpid()) - already
            own = parents.union(*map(inodes_of, workers))
            ours = {socket for socket in before if socket[2] in own}
        finally:
            (folder / "seen").touch()
        assert pool.result() == [None, None]
    assert len(workers) == 2
    assert ours, "gloo listens, or this test sees nothing"
    assert {address for address, _, _ in ours} <= LOOPBACK
    assert not {socket for socket in ours if socket[2] in parents}  # neither rendezvous nor store


def test_a_rendezvous_that_accepts_and_says_nothing_is_one_line(tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        begin = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "mpdqn",
                "train",
                "--env",
                "minatar-breakout",
                "--layout",
                "dp2",
                "--frames",
                "3000",
                "--min-replay",
                "500",
                "--timeout",
                "4",
                "--out",
                str(tmp_path),
            ],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert done.returncode == 2
    assert done.stderr == (
        "mpdqn train: rank 1 of 2 could not join the others through the rendezvous at "
        f"127.0.0.1:{port}: no answer within 9 s; look at what listens there\n"
    )
    assert time.monotonic() - begin < 4 + 10 + START_S / 2  # and the imports


# Signals


SCRIPT = """
import sys
from pathlib import Path
from mpdqn.launch import WorkerError, launch
from tests import test_launch

folder = Path(sys.argv[2])
try:
    launch(getattr(test_launch, sys.argv[1]), folder, num_workers=2)
except WorkerError as error:
    (folder / "error").write_text(str(error))
"""


def wait_forever(folder: Path) -> None:
    """Rank 0 waits inside gloo, where no signal handler of Python's can run; rank 1 in Python."""
    world = World.open(timeout_s=600)
    mesh = pipeline_of_two(world)
    start_child(folder)
    (folder / f"ready-{world.rank}").touch()
    if world.rank == 0:
        mesh.receive(torch.zeros(3), 1, "F").wait()
    time.sleep(600)


def stop_one(folder: Path) -> None:
    world = World.open(timeout_s=5)
    mesh = pipeline_of_two(world)
    start_child(folder)
    world.barrier()
    if world.rank == 0:
        mesh.receive(torch.zeros(3), 1, "F").wait()
    (folder / "stopped").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)


def start_script(function: str, folder: Path) -> subprocess.Popen[str]:
    """A Python process that calls `launch`, in a process group of its own, as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, function, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def end_script(process: subprocess.Popen[str], folder: Path) -> None:
    process.kill()
    end_processes(folder)
    process.communicate()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_script("wait_forever", tmp_path)
    yield process
    end_script(process, tmp_path)


@pytest.fixture(scope="module", autouse=True)
def with_a_stopped_worker(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run with a stopped worker, beside the other tests."""
    folder = tmp_path_factory.mktemp("stopped")
    process = start_script("stop_one", folder)
    yield process, folder
    end_script(process, folder)


def at_work(folder: Path) -> bool:
    return all((folder / f"ready-{rank}").exists() for rank in (0, 1))


def starting(folder: Path) -> bool:
    return len(workers_of(folder)) == 2


@pytest.mark.parametrize("to", ["group", "parent"])
@pytest.mark.parametrize("when", ["starting", "at_work"])
def test_ctrl_c_ends_all_workers(waiting: subprocess.Popen[str], tmp_path: Path, to: str, when: str):
    wait_for(lambda: globals()[when](tmp_path), START_S, "workers")
    (os.killpg if to == "group" else os.kill)(waiting.pid, signal.SIGINT)
    output, _ = waiting.communicate(timeout=END_S)
    assert waiting.returncode == -signal.SIGINT, output
    assert output.rstrip().splitlines()[-1].startswith("KeyboardInterrupt"), output
    assert_nothing_left(tmp_path)


def test_workers_end_with_their_parent_even_if_it_was_killed(waiting: subprocess.Popen[str], tmp_path: Path):
    wait_for(lambda: at_work(tmp_path), START_S, "workers")
    assert len(workers_of(tmp_path)) == 2
    waiting.kill()  # by SIGKILL: it has no time to see to anything
    wait_for(lambda: not workers_of(tmp_path), END_S, "end of the workers")


def test_a_stopped_worker_is_named_by_its_peers_timeout_and_ended(
    with_a_stopped_worker: tuple[subprocess.Popen[str], Path],
):
    process, folder = with_a_stopped_worker
    wait_for((folder / "stopped").exists, START_S, "stopped worker")
    output, _ = process.communicate(timeout=START_S)
    assert process.returncode == 0, output
    seconds = (folder / "error").stat().st_mtime - float((folder / "stopped").read_text())
    message = (folder / "error").read_text()
    assert re.match(
        r"rank 0 of 2 failed: PeerLost: rank 1 \(host .*\) has been silent for \d s \(--timeout 5\), last seen .*; "
        r"rank 0 \(host .*, stages \(0,\)\) was waiting for F from rank 1 \(for \d s\)$",
        message,
    ), message
    assert seconds < 5 + 10
    assert_nothing_left(folder)


# torchrun


def test_the_same_world_opens_under_torchrun(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "from mpdqn.mesh import World\n"
        "with World.open() as world:\n"
        "    ranks = world.to_first(world.rank)\n"
        "    if world.rank == 0:\n"
        "        print('ranks', ranks)\n"
    )
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert (done.returncode, done.stdout) == (0, "ranks [0, 1]\n"), done.stderr


def test_a_rank_that_died_before_the_world_was_open_is_restarted_by_torchrun(tmp_path: Path):
    """The agent's store outlives a restart: the ranks have then opened different numbers of worlds in it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "opened = os.environ['TMPDIR'] + '/opened'\n"
        "if first and os.environ['RANK'] == '1':\n"
        "    while not os.path.exists(opened):\n"
        "        time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "from mpdqn import rendezvous\n"
        "from mpdqn.mesh import World\n"
        "meet = rendezvous._meet\n"
        "def tell(*arguments):\n"
        "    open(opened, 'w').close()\n"
        "    return meet(*arguments)\n"
        "rendezvous._meet = tell\n"
        "with World.open(timeout_s=20) as world:\n"
        "    world.barrier()\n"
        "    os.write(1, f'rank {world.rank}\\n'.encode())\n"
    )
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert (done.returncode, sorted(done.stdout.split("\n"))) == (0, ["", "rank 0", "rank 1"]), done.stderr
