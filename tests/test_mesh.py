"""`World` and `Mesh`, on real gloo ranks: three that work together, and two of which one falls silent and goes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from mpdqn import rendezvous
from mpdqn.failures import PeerLost
from mpdqn.mesh import LABELS, TD_ERRORS, Mesh, World, check_device, check_world_size
from mpdqn.message import Message
from mpdqn.plan import Parallelism, Partition, Plan
from tests.distributed import run_ranks
from tests.worlds import ranks

ROOT = Path(__file__).parents[1]


def plan_of(d: int, p: int, build: Callable[..., Plan] = Plan.rectangular) -> Plan:
    return build(Partition(boundaries=tuple(range(p + 1))), Parallelism(data=d, pipeline=p))


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def three_ranks() -> dict[str, Any]:
    """A pipeline on ranks 0 and 1, then all three as replicas, then two stages on each of two ranks."""
    with World.open(timeout_s=60) as world:
        rank, seen = world.rank, {}
        seen["world"] = (rank, world.size, world.device.type)
        seen["from_first"] = world.from_first({"of": rank})
        seen["to_first"] = world.to_first((rank, "x" * rank))

        pipe = Mesh(world, plan_of(1, 2), "TD")
        seen["pipe"] = (pipe.stages, pipe.member, pipe.replica, pipe.num_stages)
        if pipe.member:
            seen["ends"] = (pipe.first_rank, pipe.last_rank, [pipe.rank_of(j) for j in range(2)])
        if rank == 0:
            # Kinds interleave in one order here and are received in another; within a kind the order holds.
            kinds = ["T", "F", "T", "D", "F", LABELS, "D", "F"]
            leaving = [pipe.send(numbers(i, i + 0.5), 1, kind) for i, kind in enumerate(kinds)]
            back = [torch.empty(3, dtype=torch.int64), torch.empty(2)]
            arriving = [pipe.receive(back[0], 1, TD_ERRORS), pipe.receive(back[1], 1, "B")]
            for message in (*leaving, *arriving):
                message.wait()
            seen["back"] = [b.tolist() for b in back]
        if rank == 1:
            for kind, count in (("F", 3), (LABELS, 1), ("D", 2), ("T", 2)):
                buffers = [torch.empty(2, dtype=torch.float64) for _ in range(count)]
                for message in [pipe.receive(b, 0, kind) for b in buffers]:
                    message.wait()
                seen[kind] = [b[0].item() for b in buffers]
            for message in [pipe.send(torch.ones(2), 0, "B"), pipe.send(torch.arange(3), 0, TD_ERRORS)]:
                message.wait()
        seen["bytes"] = (pipe.reset_bytes(), pipe.bytes_sent)

        replicas = Mesh(world, plan_of(3, 1), "T")
        seen["replicas"] = (replicas.stages, replicas.replica, replicas.first_rank, replicas.last_rank)
        tensor = numbers(rank, 10.0**rank, -1)
        message = replicas.sum_over(replicas.replica_groups[0], tensor, "a test")
        message.wait()
        seen["sum"] = (tensor.tolist(), message.tensor is tensor, replicas.reset_bytes())

        stacked = Mesh(world, plan_of(2, 2, Plan.stacked), "")
        seen["stacked"] = (stacked.stages, stacked.replica, sorted(stacked.replica_groups))
        seen["groups"] = world.group([0, 1]) is world.group((0, 1))
        with pytest.raises(ValueError, match="places stages") as error:
            Mesh(world, plan_of(2, 2), "")
        seen["too large"] = str(error.value)
        world.barrier()
        return seen


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    return run_ranks(three_ranks, num_ranks=3)


@pytest.mark.pool
def test_every_rank_knows_itself_and_the_world(three: list[dict[str, Any]]):
    assert [seen["world"] for seen in three] == [(rank, 3, "cpu") for rank in range(3)]


@pytest.mark.pool
def test_values_travel_from_and_to_the_first_rank(three: list[dict[str, Any]]):
    assert [seen["from_first"] for seen in three] == [{"of": 0}] * 3
    assert [seen["to_first"] for seen in three] == [[(0, ""), (1, "x"), (2, "xx")], [], []]


@pytest.mark.pool
def test_a_plan_laid_over_the_world_gives_each_rank_its_part(three: list[dict[str, Any]]):
    assert [seen["pipe"] for seen in three] == [((0,), True, 0, 2), ((1,), True, 0, 2), ((), False, -1, 2)]
    assert three[0]["ends"] == three[1]["ends"] == (0, 1, [0, 1])
    assert [seen["replicas"] for seen in three] == [((0,), rank, rank, rank) for rank in range(3)]
    assert [seen["stacked"] for seen in three] == [((0, 1), 0, [0, 1]), ((0, 1), 1, [0, 1]), ((), -1, [])]


@pytest.mark.pool
def test_messages_are_matched_by_kind_and_within_a_kind_in_order(three: list[dict[str, Any]]):
    received = three[1]
    assert (received["T"], received["F"], received["D"], received[LABELS]) == ([0, 2], [1, 4, 7], [3, 6], [5])
    assert three[0]["back"] == [[0, 1, 2], [1.0, 1.0]]


@pytest.mark.pool
def test_bytes_sent_are_counted_until_they_are_reset(three: list[dict[str, Any]]):
    # rank 0: 8 messages of 2 float64; rank 1: 2 float32 and 3 int64; rank 2 has no part
    assert [seen["bytes"] for seen in three] == [(8 * 16, 0), (2 * 4 + 3 * 8, 0), (0, 0)]


@pytest.mark.pool
def test_a_sum_reaches_every_rank_of_the_group(three: list[dict[str, Any]]):
    # the ring sends 2·(3 − 1)/3 of 3 float64
    assert [seen["sum"] for seen in three] == [([3.0, 111.0, -3.0], True, 32)] * 3


@pytest.mark.pool
def test_a_group_is_made_once(three: list[dict[str, Any]]):
    assert all(seen["groups"] for seen in three)


@pytest.mark.pool
def test_a_plan_for_more_ranks_than_the_world_has_is_refused(three: list[dict[str, Any]]):
    complaint = "the plan places stages on rank 3 but the world has 3 ranks; start at least 4"
    assert [seen["too large"] for seen in three] == [complaint] * 3


def lost_peer(folder: Path) -> dict[str, str]:
    """Rank 1 goes; rank 0 keeps how each kind of message complained."""
    world = World.open(timeout_s=60)
    pipe, replicas = Mesh(world, plan_of(1, 2), "TD"), Mesh(world, plan_of(2, 1), "")
    world.barrier()
    if world.rank == 1:
        time.sleep(0.5)
        os._exit(0)
    seen = {}

    def attempt(name: str, post: Callable[[], Message]) -> None:
        with pytest.raises(PeerLost) as error:
            post().wait()
        seen[name] = str(error.value)

    buffer, group = torch.zeros(5), replicas.replica_groups[0]
    attempt("dying receive", lambda: pipe.receive(buffer, 1, "B"))
    time.sleep(1)  # all of its sockets are closed by now
    attempt("dead receive", lambda: pipe.receive(buffer, 1, "D"))
    attempt("dead send", lambda: pipe.send(torch.zeros(4_000_000), 1, LABELS))
    attempt("dead sum", lambda: replicas.sum_over(group, buffer, "the gradient sum of stage 0"))
    with pytest.raises(PeerLost) as error:
        world.barrier()
    seen["barrier"] = str(error.value)
    (folder / "seen").write_text(json.dumps(seen))
    return seen


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lost")
    with ranks(lost_peer, folder, num_ranks=2, folder=folder) as world:
        world.wait(120)
        assert (folder / "seen").exists(), world.said(0)
        seen: dict[str, str] = json.loads((folder / "seen").read_text())
        return seen


@pytest.mark.pool
@pytest.mark.parametrize(
    ("case", "action"),
    [
        ("dying receive", "waiting for B from rank 1"),
        ("dead receive", "waiting for D from rank 1"),
        ("dead send", "sending labels to rank 1"),
        ("dead sum", "waiting for ranks [0, 1] in the gradient sum of stage 0"),
        ("barrier", "waiting for all ranks"),
    ],
)
def test_a_dead_peer_is_a_lost_peer_for_every_kind_of_message(lost: dict[str, str], case: str, action: str):
    assert lost[case].startswith(f"rank 0 (host {os.uname().nodename}, stages (0,)) lost a peer while {action}: ")
    assert "\n" not in lost[case]


def test_without_a_launcher_a_process_is_a_world_of_one():
    code = """
import torch
from mpdqn.mesh import Mesh, World
from mpdqn.plan import Parallelism, Partition, Plan
with World.open() as world:
    mesh = Mesh(world, Plan.stacked(Partition(boundaries=(0, 1, 2)), Parallelism(pipeline=2)), "T")
    tensor = torch.ones(2)
    mesh.sum_over(mesh.layout_group, tensor, "nothing").wait()
    world.barrier()
    print(world.rank, world.size, mesh.stages, tensor.tolist(), world.from_first(5), world.to_first(6))
assert not torch.distributed.is_initialized()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 1 (0, 1) [1.0, 1.0] 5 [6]\n"


def test_too_few_or_too_many_processes_are_refused_with_both_numbers():
    check_world_size(4, 4)
    with pytest.raises(ValueError, match=r"need d·p = 4 ranks but 3 processes were started; use --nproc-per-node 4"):
        check_world_size(4, 3)


def test_devices_that_there_are():
    check_device("cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu'; choose cpu or cuda"):
        check_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_clear_error():
    complaint = "--device cuda, but torch .* sees 0 CUDA devices here; use --device cpu or install a CUDA driver"
    with pytest.raises(ValueError, match=complaint):
        check_device("cuda")
    with pytest.raises(ValueError, match=complaint):
        World.open(device="cuda")


def test_ranks_meet_in_a_store_that_holds_what_dead_ones_left():
    """After a restart on several hosts; who was there before has asked, and was told of, another world."""
    store = HashStore()
    for left in ("hello-1", "hello-2", "opened-1", "world-1/here/1"):
        store.set(f"mpdqn/{left}", "dead")
    for _ in range(2):  # and the same processes once more
        with ThreadPoolExecutor(3) as ranks:
            worlds = list(ranks.map(lambda rank: rendezvous._meet(store, rank, 3, 20.0), range(3)))
        worlds[1].set("number", "7")
        assert [world.get("number") for world in worlds] == [b"7"] * 3
        worlds[0].delete_key("number")
    with pytest.raises(PeerLost, match=r"rank 0 waited 0.2 s \(--timeout\) for rank 1, 2 of 3 to start"):
        rendezvous._meet(store, 0, 3, 0.2)
    with pytest.raises(PeerLost, match=r"rank 1 waited 0.2 s \(--timeout\) for rank 0 of 3 to start"):
        rendezvous._meet(store, 1, 3, 0.2)
