"""The server that forks ranks: one for all pools, without threads, and ranks as if this process had started them."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mpdqn.children import WorkerWatch, state
from mpdqn.children import workers_of as workers_in
from mpdqn.failures import POOL_FOLDER, Failure
from mpdqn.forkserver import ENDING, RANK_NAME
from mpdqn.launch import WorkerError, _first_cause, interrupt_once, launch
from mpdqn.launched import launched_rank
from mpdqn.mesh import World
from tests.processes import END_S, ROOT, RUN_S, assert_nothing_left, end, run, start, wait_for, workers_of

pytestmark = [pytest.mark.pool, pytest.mark.waits]


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """What a terminal gives, also where the tests run in the background of a shell, which ignores some signals."""
    usual = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in ENDING}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def server() -> int:
    """Be a rank: the process that forked it."""
    return os.getppid()


def fields(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def meet() -> int:
    with World.open() as world:
        world.barrier()
        (torch.ones(200, 200) @ torch.ones(200, 200)).sum()
    return os.getppid()


def test_one_server_forks_the_ranks_of_every_pool_and_has_a_single_thread() -> None:
    servers = {*launch(meet, num_workers=2), *launch(server, num_workers=3)}
    (own,) = servers
    assert fields(own)["PPid"] == str(os.getpid())
    assert fields(own)["Threads"] == "1", "a lock that another thread holds would be held for ever in each rank"


def test_after_a_killed_rank_the_next_pool_has_the_same_server() -> None:
    before = launch(server, num_workers=1)
    with pytest.raises(WorkerError, match=r"^rank 0 of 1 failed: killed by SIGKILL$"):
        launch(lambda: os.kill(os.getpid(), signal.SIGKILL), num_workers=1)
    assert launch(server, num_workers=1) == before


def test_a_killed_server_that_the_program_has_waited_for_is_replaced() -> None:
    (before,) = launch(server, num_workers=1)
    os.kill(before, signal.SIGKILL)
    os.waitpid(before, 0)
    assert launch(server, num_workers=1) != [before]


def kill_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    threading.Event().wait()


def test_ranks_end_with_a_killed_server_and_the_next_pool_has_a_new_one() -> None:
    (before,) = launch(server, num_workers=1)
    with pytest.raises(WorkerError, match=r"^rank \d of 2 failed: the process that forks ranks has ended$"):
        launch(kill_server, num_workers=2)
    (after,) = launch(server, num_workers=1)
    assert after != before


def test_the_server_lives_through_what_a_scheduler_sends_to_all_processes() -> None:
    (own,) = launch(server, num_workers=1)
    for number in ENDING:
        os.kill(own, number)
    assert launch(server, num_workers=1) == [own]


def hold(pipe: Connection) -> None:
    pipe.recv()


def test_other_processes_of_the_program_that_the_server_forks_end_as_they_always_do() -> None:
    launch(server, num_workers=1)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=hold, args=(theirs,))
    process.start()
    process.terminate()
    process.join(END_S)
    assert process.exitcode == -signal.SIGTERM
    ours.close()
    theirs.close()


FORKS = """
import os, sys
from mpdqn.launch import launch
print(launch(lambda: 1, num_workers=1), flush=True)
if (child := os.fork()) == 0:
    print(launch(lambda: 2, num_workers=1), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(launch(lambda: 3, num_workers=1), flush=True)
"""


def test_a_child_that_the_program_forks_has_a_server_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FORKS)
    done = run([sys.executable, "script.py"], tmp_path, anew=True)
    assert (done.returncode, done.stdout) == (0, "[1]\n[2]\n[3]\n"), done.stderr


# How pools end


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ranks_that_leave_without_a_result_and_without_an_error_are_a_failure(num_workers: int) -> None:
    with pytest.raises(WorkerError, match=rf"^rank 0 of {num_workers} failed: it ended without a result$"):
        launch(os._exit, 0, num_workers=num_workers)


def leave_one() -> None:
    if launched_rank() == 1:
        os._exit(0)
    threading.Event().wait()


def test_a_rank_that_leaves_the_others_without_an_error_is_named() -> None:
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 failed: it ended without a result$"):
        launch(leave_one, num_workers=2)


def test_a_rank_that_its_peers_have_killed_is_no_cause_also_where_the_launcher_does_not_tell(tmp_path: Path) -> None:
    lost = Failure(kind="PeerLost", message="1 is silent", trace="", consequence=True, at=0.0, ended=(1,))
    lost.write(tmp_path, 0)
    watch = WorkerWatch(tmp_path, 1.0, 2, None)
    watch.vanished.add(1)  # it was seen before the launcher looked
    assert str(_first_cause(tmp_path, {}, 2, watch)) == "rank 0 of 2 failed: PeerLost: 1 is silent"


def test_a_rank_of_which_the_launcher_tells_comes_before_those_that_it_ended_for_it(tmp_path: Path) -> None:
    watch = WorkerWatch(tmp_path, 1.0, 3, None)
    watch.vanished |= {0, 1}
    killed = ProcessFailure(local_rank=1, pid=1, exitcode=-signal.SIGKILL, error_file="")
    assert str(_first_cause(tmp_path, {1: killed}, 3, watch)) == "rank 1 of 3 failed: killed by SIGKILL"


def kill_one_of_three() -> None:
    """Rank 2 is done, rank 0 works on, rank 1 is killed."""
    pool = POOL_FOLDER.get()
    assert pool is not None
    if launched_rank() < 2:
        wait_for((pool / "result-2.pkl").exists, END_S, "result of rank 2")
        if launched_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def test_a_killed_rank_is_named_though_another_one_is_done_and_a_third_one_works_on() -> None:
    with pytest.raises(WorkerError, match=r"^rank 1 of 3 failed: killed by SIGKILL$"):
        launch(kill_one_of_three, num_workers=3)


def interrupted_twice(folder: Path) -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        (folder / "whole").touch()


@pytest.mark.usefixtures("usual_signals")
def test_a_rank_takes_ctrl_c_once_and_tidies_up(tmp_path: Path) -> None:
    """It comes from the terminal, and from the launcher that had it from there as well."""
    with pytest.raises(WorkerError, match=r"^rank 0 of 1 failed: exited with code 130$"):
        launch(interrupted_twice, tmp_path, num_workers=1)
    assert (tmp_path / "whole").exists()


def save_when_told(folder: Path) -> str:
    if launched_rank() == 1:
        return "done before"
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    pool = POOL_FOLDER.get()
    assert pool is not None
    wait_for((pool / "result-1.pkl").exists, END_S, "result of the other one")
    (folder / "ready").touch()
    assert told.wait(END_S)
    return "saved"


def test_sigterm_finds_a_rank_that_is_done_and_one_that_has_work_to_save(tmp_path: Path) -> None:
    def tell() -> None:
        wait_for((tmp_path / "ready").exists, END_S, "rank")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell)
    thread.start()
    assert launch(save_when_told, tmp_path, num_workers=2, forward_sigterm=True) == ["saved", "done before"]
    thread.join()


def stop_when_done(folder: Path) -> None:
    """Rank 1 is done, and stopped; rank 0 ends when it is."""
    if launched_rank() == 0:
        pool = POOL_FOLDER.get()
        assert pool is not None
        wait_for((pool / "result-1.pkl").exists, END_S, "result of the other one")
        done = workers_in(pool)[1]
        assert done is not None
        time.sleep(1.0)  # it waits for what the launcher has to say
        os.kill(done, signal.SIGSTOP)


def test_a_rank_that_is_stopped_when_it_is_done_ends_like_any_stopped_rank(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 failed: stopped \(SIGSTOP\) for \d+ s, and killed$"):
        launch(stop_when_done, tmp_path, num_workers=2, timeout_s=1)


def stop_server_and_fail() -> None:
    pool = POOL_FOLDER.get()
    assert pool is not None
    if launched_rank() == 0:
        wait_for(lambda: len(workers_in(pool)) == 2, END_S, "rank 1")
        os.kill(os.getppid(), signal.SIGSTOP)
        raise ValueError("my own fault")


def test_an_error_is_told_though_the_server_is_stopped_and_the_next_pool_has_a_new_one() -> None:
    (before,) = launch(server, num_workers=1)
    with pytest.raises(WorkerError, match=r"^rank 0 of 2 failed: ValueError: my own fault"):
        launch(stop_server_and_fail, num_workers=2, timeout_s=1)
    (after,) = launch(server, num_workers=1)
    assert after != before
    assert state(before) in ("", "Z")


def stop_server_and_be_done() -> int:
    os.kill(os.getppid(), signal.SIGSTOP)
    return launched_rank()


def test_results_are_returned_though_the_server_is_stopped() -> None:
    assert launch(stop_server_and_be_done, num_workers=1, timeout_s=1) == [0]


def leave_a_thread() -> int:
    event = multiprocessing.get_context("spawn").Event()
    threading.Thread(target=lambda: [event.wait(0.1) for _ in range(20)]).start()
    return 1


def test_a_rank_that_is_done_waits_for_its_own_threads() -> None:
    assert launch(leave_a_thread, num_workers=1) == [1]


IMPORTING = """
import os, signal, sys, time
from multiprocessing import forkserver as theirs
from mpdqn import forkserver
from mpdqn.children import state
from mpdqn.launch import WorkerError, launch
number, to = getattr(signal, sys.argv[1]), sys.argv[2]
forkserver.start()
server = forkserver.server_pid()
assert server is not None
if to == "server before":
    os.kill(server, number)
    while state(server) not in "TZ":
        time.sleep(0.01)
else:
    read = theirs.read_signed
    def when_asked(descriptor):
        theirs.read_signed = read
        os.kill(server if to == "server" else os.getpid(), number)
        return read(descriptor)
    theirs.read_signed = when_asked
try:
    launch(print, "late", num_workers=1, timeout_s=1)
except (WorkerError, KeyboardInterrupt) as error:
    print(f"{type(error).__name__}: {error}; {state(server) in ('', 'Z')}", flush=True)
print(launch(lambda: 1, num_workers=1), flush=True)
"""
"""The server still imports when a signal is sent: to the program that waits for a rank, or to the server itself."""


@pytest.mark.parametrize(
    ("number", "to", "said"),
    [
        ("SIGINT", "program", r"KeyboardInterrupt: stopped by SIGINT; True\n"),
        ("SIGKILL", "server", r"WorkerError: the process that forks ranks has ended; True\n"),
        (
            "SIGSTOP",
            "server",
            r"WorkerError: the process that forks ranks was stopped \(SIGSTOP\) for \d+ s, .*; True\n",
        ),
        ("SIGSTOP", "server before", "late\n"),
    ],
)
def test_a_server_that_still_imports(number: str, to: str, said: str, tmp_path: Path) -> None:
    """It ends, lest a rank come when nobody waits for it; no pool waits for ever, and the next one has a new server."""
    (tmp_path / "script.py").write_text(IMPORTING)
    done = run([sys.executable, "script.py", number, to], tmp_path, anew=True)
    assert re.fullmatch(rf"{said}\[1\]\n", done.stdout), done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_more_ranks_than_one_process_can_start() -> None:
    with pytest.raises(ValueError, match=r"^num_workers is 130 but a pool has 1 to 120; start more of them with torch"):
        launch(server, num_workers=130)


def leave_a_child(folder: Path) -> None:
    if os.fork() == 0:
        (folder / "child").write_text(str(os.getpid()))
        time.sleep(600)
    wait_for((folder / "child").exists, END_S, "child")
    raise ValueError("with a child")


def test_what_a_failed_rank_has_forked_ends_with_it_also_where_tmpdir_is_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))
    with pytest.raises(WorkerError, match="with a child"):
        launch(leave_a_child, tmp_path, num_workers=1)
    assert state(int((tmp_path / "child").read_text())) in ("", "Z")


# What ranks have of the process that called


def test_two_pools_at_once_leave_the_main_module_alone() -> None:
    main = sys.modules["__main__"]
    with ThreadPoolExecutor(2) as threads:
        pools = [threads.submit(launch, time.sleep, seconds, num_workers=1) for seconds in (0.5, 1.0)]
        assert sys.modules["__main__"] is main
        assert [pool.result() for pool in pools] == [[None], [None]]
    assert sys.modules["__main__"] is main


STARTS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from mpdqn.launch import launch
with ThreadPoolExecutor(4) as threads:
    pools = [threads.submit(launch, os.getppid, num_workers=1) for _ in range(4)]
    print(len({pool.result()[0] for pool in pools}), sys.warnoptions)
"""


def test_first_pools_in_several_threads_start_one_server_in_a_folder_of_any_length(tmp_path: Path) -> None:
    """Its sockets lie in TMPDIR, whose path here is longer than a socket's may be."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    (folder / "script.py").write_text(STARTS)
    done = run([sys.executable, "-W", "error", "script.py"], folder, anew=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 ['error']\n", "")


REDIRECTED = """
import os
from mpdqn.launch import launch
launch(os.getpid, num_workers=1)
os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
for number in range(2):
    os.write(1, b"main\\n")
    launch(print, f"rank {number}", num_workers=1)
os.close(1)
launch(print, "nowhere", num_workers=1)
"""


def test_ranks_write_where_the_caller_does_between_what_it_writes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(REDIRECTED)
    done = run([sys.executable, "script.py"], tmp_path, anew=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "log").read_text() == "main\nrank 0\nmain\nrank 1\n"


USERS = """
import os, signal, sys, time
from multiprocessing import get_context
from pathlib import Path

def work(*others):
    Path("draft").write_text(" ".join(map(str, (os.getpid(), os.getppid(), *others))))
    Path("draft").rename("processes")
    time.sleep(600)

def tell(queue):
    import numpy
    names = ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "PYTHONWARNINGS", "TORCH_DISTRIBUTED_DEBUG", "PYTHONPATH")
    queue.put((numpy.random.rand(), [os.environ.get(name) for name in names], signal.pthread_sigmask(0, [])))

if __name__ == "__main__":
    from mpdqn.launch import launch
    before = get_context("forkserver").Process(target=time.sleep, args=(600,))
    before.start()  # the program has a server of its own
    launch(os.getpid, num_workers=1)
    queue = get_context("forkserver").SimpleQueue()
    processes = [get_context("forkserver").Process(target=tell, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
        process.join()
    (a, *about), (b, *_) = queue.get(), queue.get()
    print(a != b, about[0][:4], about[0][4] == os.environ["PYTHONPATH"], about[1])
    process = get_context("forkserver").Process(target=time.sleep, args=(600,))
    process.start()
    launch(work, os.getpid(), process.pid, before.pid, num_workers=1)
"""


def test_the_programs_own_processes_have_nothing_of_ranks_and_keep_none_alive(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(USERS)
    process = start([sys.executable, "script.py"], tmp_path)
    try:
        wait_for(lambda: (tmp_path / "processes").exists() or process.poll() is not None, RUN_S, "rank")
        assert process.poll() is None, process.communicate()
        rank, server, main, *others = map(int, (tmp_path / "processes").read_text().split())
        process.kill()
        wait_for(lambda: not any(state(pid) not in ("", "Z") for pid in (rank, server, main)), END_S, "end")
        for pid in others:
            assert state(pid) not in ("", "Z"), "it is the program's own"
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        assert out == "True [None, None, None, None] True set()\n"
        assert "Traceback" not in err, "and of semaphores its tracker tells, as always"
    finally:
        end(process)


def random_number() -> float:
    return float(np.random.rand())


def test_numpy_is_seeded_anew_in_each_rank() -> None:
    assert len({*launch(random_number, num_workers=2), *launch(random_number, num_workers=2)}) == 4


def surroundings() -> dict[str, object]:
    mask = os.umask(0)
    os.umask(mask)
    print("said by a rank", flush=True)
    return {
        "folder": os.getcwd(),
        "variable": os.environ.get("MPDQN_TEST"),
        "gone": os.environ.get("LOCAL_GONE"),
        "cores": os.sched_getaffinity(0),
        "threads": torch.get_num_threads(),
        "mask": mask,
        "temporary": tempfile.gettempdir(),
        "signals": [signal.getsignal(number) for number in ENDING],
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "warnings": (sys.warnoptions, os.environ.get("PYTHONWARNINGS")),
        "name": Path("/proc/self/comm").read_text().strip(),
        "main": sys.modules["__main__"].__name__,
    }


@pytest.mark.usefixtures("usual_signals")
def test_ranks_have_the_surroundings_of_the_caller_as_they_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_GONE", "1")
    launch(server, num_workers=1)  # the server is there, with other surroundings
    monkeypatch.delenv("LOCAL_GONE")
    monkeypatch.setenv("MPDQN_TEST", "now")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cores, mask, filters = os.sched_getaffinity(0), os.umask(0o027), os.environ.get("PYTHONWARNINGS")
    os.sched_setaffinity(0, {min(cores)})
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        (found,) = launch(surroundings, num_workers=1)
    finally:
        os.umask(mask)
        os.sched_setaffinity(0, cores)
        signal.signal(signal.SIGHUP, hang_up)
    assert found == {
        "folder": str(tmp_path),
        "variable": "now",
        "gone": None,
        "cores": {min(cores)},
        "threads": 1,
        "mask": 0o027,
        "temporary": str(tmp_path),
        "signals": [interrupt_once, signal.SIG_DFL, signal.SIG_IGN, signal.SIG_DFL],
        "blocked": set(),
        "warnings": ([w for w in (filters or "").split(",") if w], filters),
        "name": f"{RANK_NAME}0",
        "main": "__main__",
    }
    assert capfd.readouterr().out == "said by a rank\n"


def test_a_script_that_starts_pools_is_not_run_again_in_their_ranks(tmp_path: Path) -> None:
    """It has no guard for __main__, and threads of its own while ranks are forked."""
    (tmp_path / "script.py").write_text(
        "import os, sys, threading\n"
        "from mpdqn.launch import launch\n"
        "print('begun', flush=True)\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "def own(x):\n"
        "    return x + offset\n"
        "offset = 40\n"
        "print(launch(own, 2, num_workers=2), launch(own, 3, num_workers=1))\n"
        "print(sys.modules['__main__'].offset)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n[42, 42] [43]\n40\n", "")
    assert_nothing_left(tmp_path)


WAITING = """
import time
from mpdqn.launch import launch
launch(time.sleep, 600, num_workers=2)
"""


def test_server_and_ranks_end_with_a_killed_main_process_stopped_ones_too(tmp_path: Path) -> None:
    process = start([sys.executable, "-c", WAITING], tmp_path)
    try:
        wait_for(lambda: len(workers_of(tmp_path)) == 2, RUN_S, "ranks")
        ranks = workers_of(tmp_path)
        own = int(fields(ranks[0])["PPid"])
        assert fields(own)["PPid"] == str(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        process.kill()
        process.communicate()
        wait_for(lambda: not any(state(pid) not in ("", "Z") for pid in (own, *ranks.values())), END_S, "end")
    finally:
        end(process)
