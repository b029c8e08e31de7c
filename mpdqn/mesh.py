"""`World` and `Mesh`: from a `Plan` and the processes that there are to process groups.

A `World` is all the processes of a run; a `Mesh` is what one plan makes of them. For d = 2 replicas × p = 2 stages:

                 stage 0   stage 1
    replica 0    rank 0 -> rank 1      -> point-to-point, one process group per message kind
    replica 1    rank 2 -> rank 3
                    |         |
                 replica groups: gradients are summed down each column

Point-to-point messages of one kind between two ranks are matched in the order in which they are posted, so kinds never
share a group. This is the only file that reads RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mpdqn.beat import Activity
from mpdqn.failures import POOL_FOLDER, PeerLost, first_line, tells_of_lost_peer
from mpdqn.heartbeat import NO_LIMIT, Heartbeat
from mpdqn.launched import launched_local_world_size, launched_rank, launched_world_size
from mpdqn.message import Message
from mpdqn.plan import Plan
from mpdqn.rendezvous import attempt, join

T = TypeVar("T")

LABELS = "labels"
TD_ERRORS = "td_errors"


def check_device(device: str) -> None:
    """Raise ValueError unless ``device`` is ``cpu``, or ``cuda`` and torch sees a CUDA device."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda, but torch {torch.__version__} sees 0 CUDA devices here; "
            "use --device cpu or install a CUDA driver"
        )


def check_world_size(ranks_needed: int, world_size: int) -> None:
    """Raise ValueError unless the processes that were started are exactly as many as the layouts need."""
    if ranks_needed != world_size:
        raise ValueError(
            f"the layouts need d·p = {ranks_needed} ranks but {world_size} processes were started; "
            f"use --nproc-per-node {ranks_needed} or other --layouts"
        )


@dataclass(kw_only=True)
class World:
    """All processes of a run. Built by `World.open`; a context manager, which leaves the process groups at its end.

    Process groups are made by all ranks together, in the same order; `group` and `message_group` therefore must be
    called alike on every rank. Each is made once and kept. ``lobby`` is the gloo group of all ranks in which they meet
    between layouts. Messages have no time limit; a rank that falls silent meanwhile ends all (`mpdqn.heartbeat`).

    Attributes:
        activity: what this rank's main thread is doing, for its peers to name.
        heartbeat: its beats to the others; None in a world of one.
    """

    rank: int
    size: int
    device: torch.device
    lobby: dist.ProcessGroup
    activity: Activity
    heartbeat: Heartbeat | None = None
    _groups: dict[tuple[tuple[int, ...], str | None, str], dist.ProcessGroup] = field(default_factory=dict)

    @classmethod
    def open(cls, device: str = "cpu", timeout_s: float = 45.0) -> Self:
        """Join the processes that the launcher started; alone, be a world of one.

        The backend is NCCL where every process of this host has a GPU of its own, otherwise gloo.

        Args:
            device: ``cpu`` or ``cuda``.
            timeout_s: seconds of silence after which a rank is lost and all others end.

        Raises:
            ValueError: for a device that is not there.
            PeerLost: if the rendezvous does not answer or a rank does not come.
        """
        check_device(device)
        rank, size = launched_rank(), launched_world_size()
        own, backend = torch.device("cpu"), "gloo"
        if device == "cuda":
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(own)
            backend = "nccl" if torch.cuda.device_count() >= launched_local_world_size() else "gloo"
        pool, activity, heartbeat = POOL_FOLDER.get(), Activity(), None
        store = join(backend, rank, size, timeout_s, pool)
        if size > 1:
            port = int(os.environ.get("MASTER_PORT", "0")) if pool is None else 0
            limit = timedelta(seconds=timeout_s)
            heartbeat = attempt(  # nothing watches over the ranks before it is there
                f"rank {rank} of {size} could not connect to the other ranks",
                timeout_s,
                lambda: Heartbeat(
                    rank, _new_group(range(size), "gloo", limit), timeout_s, activity, pool=pool, store_port=port
                ),
            )
            store.set_timeout(NO_LIMIT)  # NCCL meets there once more in a group's first message, after a compilation
        lobby = _new_group(range(size), "gloo")
        world = cls(rank=rank, size=size, device=own, lobby=lobby, activity=activity, heartbeat=heartbeat)
        activity.set("preparing")
        if heartbeat is not None:  # a script that ends without closing its world leaves in good order too
            atexit.register(world._say_goodbye)
        return world

    def _say_goodbye(self) -> None:
        """Leave at the end of the interpreter; after an error, which it has printed, without its further clean-up.

        A thread that waits inside gloo for a peer may not wake up while the interpreter ends.
        """
        error = getattr(sys, "last_value", None)
        if self.heartbeat is not None:
            self.heartbeat.close(error)
        if error is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def name(self, rank: int) -> str:
        """Return ``rank`` with its host and its part in the layout, as messages name it."""
        return f"rank {rank}" if self.heartbeat is None else self.heartbeat.name(rank)

    @contextlib.contextmanager
    def on_loss(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Have ``tell`` called with the reason if a lost peer ends this process inside the context."""
        listeners = [] if self.heartbeat is None else self.heartbeat.on_loss
        listeners.append(tell)
        try:
            yield
        finally:
            listeners.remove(tell)

    def group(self, ranks: Sequence[int], backend: str | None = None, purpose: str = "") -> dist.ProcessGroup:
        """Return the process group of ``ranks``, made once for each ``purpose``. Collective.

        Args:
            ranks: its members.
            backend: the world's if None, or ``gloo`` for tensors on the CPU.
            purpose: threads that meet for different purposes have a group each.
        """
        key = (tuple(ranks), backend, purpose)
        if key not in self._groups:
            self._groups[key] = _new_group(key[0], backend)
        return self._groups[key]

    def message_group(self, kind: str, backend: str | None = None) -> dist.ProcessGroup:
        """Return the process group, over the whole world, of point-to-point messages of ``kind``. Collective."""
        return self.group(range(self.size), backend, f"messages of kind {kind}")

    def send(self, tensor: Tensor, to: int, group: dist.ProcessGroup, what: str) -> Message:
        """Start sending ``tensor`` (dense) to rank ``to`` in a message group; keep the message until it was waited for.

        ``what`` it is, such as "weights", for errors.
        """
        # A rank of the world has the same number in a message group. dist.isend looks that up for every message.
        return self.start(lambda: group.send([tensor], to, 0), tensor, group, f"sending {what} to rank {to}")

    def receive(self, buffer: Tensor, source: int, group: dist.ProcessGroup, what: str) -> Message:
        """Start receiving into ``buffer`` (dense) from rank ``source`` in a message group."""
        action = f"waiting for {what} from rank {source}"
        return self.start(lambda: group.recv([buffer], source, 0), buffer, group, action)

    def start(
        self, post: Callable[[], dist.Work | None], tensor: Tensor, group: dist.ProcessGroup, action: str
    ) -> Message:
        """Return the message that ``post`` starts; ``action`` says what this rank does in it.

        Raises:
            PeerLost: if the peer is known to be gone.
        """
        try:
            return Message(post(), tensor, group, lambda: self.waiting(action))
        except RuntimeError as error:
            if not tells_of_lost_peer(error):
                raise
            raise self._lost(error, action) from error  # gloo refuses a message when it knows that the peer is gone

    def _lost(self, error: RuntimeError, action: str) -> PeerLost:
        return PeerLost(f"{self.name(self.rank)} lost a peer while {action}: {first_line(error)}")

    def barrier(self, action: str = "waiting for all ranks") -> None:
        """Wait for every rank.

        Raises:
            PeerLost: if one is gone.
        """
        with self.waiting(action):
            dist.barrier(self.lobby)

    def from_first(self, value: T) -> T:
        """The value that rank 0 has, on every rank. Collective; small plain values only."""
        values = [value]
        with self.waiting("waiting for rank 0 to share a value"):
            dist.broadcast_object_list(values, src=0, group=self.lobby)
        return values[0]

    def to_first(self, value: T) -> list[T]:
        """What every rank has, on rank 0, by rank; an empty list elsewhere. Collective; small plain values only."""
        values: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        with self.waiting("waiting for rank 0 to gather a value"):
            dist.gather_object(value, values, dst=0, group=self.lobby)
        return cast(list[T], values or [])

    @contextlib.contextmanager
    def waiting(self, action: str) -> Iterator[None]:
        """Note that the main thread is ``action`` inside, a collective of torch.

        Raises:
            PeerLost: if a peer is gone.
        """
        with self.activity.waiting(action):
            try:
                yield
            except RuntimeError as error:
                if not tells_of_lost_peer(error):
                    raise
                raise self._lost(error, action) from error

    def close(self) -> None:
        """Leave every process group."""
        atexit.unregister(self._say_goodbye)
        if self.heartbeat is not None:
            self.heartbeat.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the peers may be gone, and leaving in good order would wait for them: they are told.
        if error is None or self.size == 1:
            self.close()
        elif self.heartbeat is not None:
            self.heartbeat.close(error)


class Mesh:
    """One plan laid over a world: who am I, whom do I talk to.

    Building one is collective over the world, ranks without a part included (for them ``stages`` is empty).

    Attributes:
        replica: the replica this rank serves (-1 without a part).
        stages: the stages this rank holds, ascending.
        replica_groups: for each stage of this rank, the group of the ranks that hold it in all replicas.
        layout_group: all ranks of the plan.
        bytes_sent: bytes that this rank has handed to the network since `reset_bytes`.
    """

    def __init__(self, world: World, plan: Plan, letters: str) -> None:
        """Lay ``plan`` over ``world``; ``letters`` are the agent's no-gradient passes.

        Raises:
            ValueError: if the plan names a rank that the world does not have.
        """
        if plan.ranks[-1] >= world.size:
            raise ValueError(
                f"the plan places stages on rank {plan.ranks[-1]} but the world has {world.size} ranks; "
                f"start at least {plan.ranks[-1] + 1}"
            )
        self.world, self.plan = world, plan
        self.rank, self.device = world.rank, world.device
        self.stages = plan.stages_of(self.rank)
        self.member = bool(self.stages)
        self.replica = plan.replica_of(self.rank) if self.member else -1
        world.activity.role = f"stages {self.stages}" if self.member else "no stage"
        self.bytes_sent = 0
        self.num_stages = plan.partition.num_stages
        columns = [world.group(sorted(set(ranks))) for ranks in plan.placement]
        pipelines = [world.group(sorted(set(plan.replica(r)))) for r in range(plan.parallelism.data)]
        self.replica_groups = {stage: columns[stage] for stage in self.stages}
        self.pipeline_group = pipelines[self.replica] if self.member else pipelines[0]
        self.layout_group = world.group(plan.ranks)
        # NCCL runs all messages of a pair in a group one after the other, whatever their direction: where stages of
        # several chunks send both ways, a send could wait behind another that waits for it. gloo has no such order.
        self._two_way = self.member and dist.get_backend(self.layout_group) == "nccl"
        kinds = ("F", "B", *letters, LABELS, TD_ERRORS)
        self._kinds = {(kind, False): world.message_group(kind) for kind in kinds}
        if dist.get_backend() == "nccl":
            self._kinds |= {(kind, True): world.message_group(f"{kind} to lower ranks") for kind in kinds}
        if self.member and dist.get_backend(self.layout_group) == "nccl":
            self._introduce()

    def _introduce(self) -> None:
        """Send one number over every route, in one order on all ranks.

        NCCL makes the communicator of a pair at its first message and holds the host until both are there. Two ranks
        that begin with different kinds would wait for each other.
        """
        owners = self.plan.replica(self.replica)
        steps = list(itertools.pairwise(owners))
        both_ways = (*steps, *((b, a) for a, b in reversed(steps)))
        routes = [(kind, route) for kind in dict.fromkeys(kind for kind, _ in self._kinds) for route in both_ways]
        routes += [(LABELS, (owners[0], owners[-1])), (TD_ERRORS, (owners[-1], owners[0]))]
        number = torch.zeros(1, device=self.device)
        for kind, (source, to) in routes:
            if source != to and self.rank == source:
                self.send(number, to, kind).wait()
            elif source != to and self.rank == to:
                self.receive(number, source, kind).wait()
        self.reset_bytes()

    @property
    def first_rank(self) -> int:
        """The rank of this replica's first stage, which owns the replica's virtual shards."""
        return self.plan.replica(self.replica)[0]

    @property
    def last_rank(self) -> int:
        """The rank of this replica's last stage, where the loss is."""
        return self.plan.replica(self.replica)[-1]

    def rank_of(self, stage: int) -> int:
        """The rank that holds ``stage`` in this replica."""
        return self.plan.replica(self.replica)[stage]

    def _group_of(self, kind: str, source: int, to: int) -> dist.ProcessGroup:
        return self._kinds[kind, self._two_way and source > to]

    def send(self, tensor: Tensor, to: int, kind: str) -> Message:
        """Start sending ``tensor`` (dense) to rank ``to``; keep the message until it was waited for."""
        self.bytes_sent += tensor.nbytes
        group = self._group_of(kind, self.rank, to)
        return self.world.send(tensor, to, group, kind)

    def receive(self, buffer: Tensor, source: int, kind: str) -> Message:
        """Start receiving into ``buffer`` (dense) from rank ``source``."""
        group = self._group_of(kind, source, self.rank)
        return self.world.receive(buffer, source, group, kind)

    def sum_over(self, group: dist.ProcessGroup, tensor: Tensor, what: str) -> Message:
        """Start the all-reduce (sum) of ``tensor`` over ``group``, in place."""
        size = dist.get_world_size(group)
        # A ring all-reduce sends 2·(n − 1)/n of the tensor from every rank.
        self.bytes_sent += 2 * (size - 1) * tensor.numel() * tensor.element_size() // size
        action = f"waiting for ranks {dist.get_process_group_ranks(group)} in {what}"
        return self.world.start(lambda: dist.all_reduce(tensor, group=group, async_op=True), tensor, group, action)

    def reset_bytes(self) -> int:
        """The bytes sent since the last call."""
        count, self.bytes_sent = self.bytes_sent, 0
        return count


def _new_group(ranks: Sequence[int], backend: str | None = None, timeout: timedelta = NO_LIMIT) -> dist.ProcessGroup:
    # For ranks outside the group torch returns a number instead of a group; they never use it.
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=timeout, backend=backend))
