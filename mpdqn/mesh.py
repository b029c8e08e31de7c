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

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mpdqn.plan import Plan

T = TypeVar("T")

LOBBY = timedelta(days=1)
"""How long a rank waits for the others between layouts, where a healthy run may keep it waiting for long."""

LABELS = "labels"
TD_ERRORS = "td_errors"


class PeerLost(RuntimeError):
    """A message did not come: the peer died, or was silent for longer than the timeout."""


def tells_of_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says that another process is gone or silent, rather than that this one is at fault."""
    lost = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "Operation timed out",
        "timeout caused pair closure",  # the message before this one timed out
        "connectFullMesh failed",
        "wait timeout after",
    )
    return isinstance(error, PeerLost) or (isinstance(error, RuntimeError) and any(text in str(error) for text in lost))


def launched() -> bool:
    """Whether a launcher (torchrun, or mpdqn's own pool) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """This process's rank as the launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_world_size() -> int:
    """The number of those processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_world_size()))


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
    between layouts. A rank without a part waits there for as long as the others work, so its limit is `LOBBY`; a rank
    that dies meanwhile is the launcher's business, which ends all of them.
    """

    rank: int
    size: int
    device: torch.device
    timeout: timedelta
    lobby: dist.ProcessGroup
    _groups: dict[tuple[tuple[int, ...], str | None], dist.ProcessGroup] = field(default_factory=dict)
    _message_groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)

    @classmethod
    def open(cls, device: str = "cpu", timeout_s: float = 60.0) -> Self:
        """Join the processes that the launcher started; alone, be a world of one.

        The backend is NCCL where every process of this host has a GPU of its own, otherwise gloo.

        Args:
            device: ``cpu`` or ``cuda``.
            timeout_s: how long a rank waits for a message before it gives up, in seconds.
        """
        check_device(device)
        rank, size = launched_rank(), launched_world_size()
        timeout = timedelta(seconds=timeout_s)
        own, backend = torch.device("cpu"), "gloo"
        if device == "cuda":
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(own)
            backend = "nccl" if torch.cuda.device_count() >= launched_local_world_size() else "gloo"
        if launched():
            dist.init_process_group(backend, timeout=timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in torch's __all__
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        lobby = _new_group(range(size), LOBBY, "gloo")
        return cls(rank=rank, size=size, device=own, timeout=timeout, lobby=lobby)

    def group(self, ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
        """The process group of ``ranks``; of the world's backend, or of gloo for tensors on the CPU. Collective."""
        key = (tuple(ranks), backend)
        if key not in self._groups:
            self._groups[key] = _new_group(key[0], self.timeout, backend)
        return self._groups[key]

    def message_group(self, kind: str, backend: str | None = None, *, patient: bool = False) -> dist.ProcessGroup:
        """The process group, over the whole world, of point-to-point messages of ``kind``. Collective.

        ``patient`` as in `send`.
        """
        if kind not in self._message_groups:
            limit = LOBBY if patient else self.timeout
            self._message_groups[kind] = _new_group(range(self.size), limit, backend)
        return self._message_groups[kind]

    def meeting(self, ranks: Sequence[int], purpose: str = "") -> dist.ProcessGroup:
        """A gloo group of ``ranks`` that may wait there for each other's work for long, as in the lobby. Collective.

        Threads that meet for different purposes have a group each.
        """
        key = (tuple(ranks), f"meeting {purpose}")
        if key not in self._groups:
            self._groups[key] = _new_group(key[0], LOBBY, "gloo")
        return self._groups[key]

    def send(
        self, tensor: Tensor, to: int, group: dist.ProcessGroup, complaint: str, *, patient: bool = False
    ) -> Message:
        """Start sending ``tensor`` (dense) to rank ``to`` in a message group; keep the message until it was waited for.

        ``complaint`` is how a `PeerLost` begins. A ``patient`` message waits for as long as a healthy peer may work
        (`LOBBY`); one that died still ends it at once.
        """
        # A rank of the world has the same number in a message group. dist.isend looks that up for every message.
        return self.start(lambda: group.send([tensor], to, 0), tensor, group, complaint, patient=patient)

    def receive(
        self, buffer: Tensor, source: int, group: dist.ProcessGroup, complaint: str, *, patient: bool = False
    ) -> Message:
        """Start receiving into ``buffer`` (dense) from rank ``source`` in a message group."""
        return self.start(lambda: group.recv([buffer], source, 0), buffer, group, complaint, patient=patient)

    def start(
        self,
        post: Callable[[], dist.Work | None],
        tensor: Tensor,
        group: dist.ProcessGroup,
        complaint: str,
        *,
        patient: bool = False,
    ) -> Message:
        """The message that ``post`` starts.

        Raises:
            PeerLost: if the peer is known to be gone.
        """
        try:
            return Message(post(), tensor, group, complaint, LOBBY if patient else self.timeout)
        except RuntimeError as error:
            if not tells_of_lost_peer(error):
                raise
            # gloo refuses a message at once when it already knows that the peer is gone.
            raise PeerLost(f"{complaint}: {_first_line(error)}") from error

    def barrier(self) -> None:
        """Wait for every rank; PeerLost names the first one that does not come."""
        try:
            dist.monitored_barrier(self.lobby, timeout=LOBBY)
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} waited in vain between layouts: {_first_line(error)}") from error

    def from_first(self, value: T) -> T:
        """The value that rank 0 has, on every rank. Collective; small plain values only."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.lobby)
        return values[0]

    def to_first(self, value: T) -> list[T]:
        """What every rank has, on rank 0, by rank; an empty list elsewhere. Collective; small plain values only."""
        values: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.lobby)
        return cast(list[T], values or [])

    def close(self) -> None:
        """Leave every process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the peers may be gone, and leaving in good order would wait for them.
        if error is None or self.size == 1:
            self.close()


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
        self._me = f"rank {self.rank} (stages {self.stages})"
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
        return self.world.send(tensor, to, group, f"{self._me} could not send {kind} to rank {to}")

    def receive(self, buffer: Tensor, source: int, kind: str) -> Message:
        """Start receiving into ``buffer`` (dense) from rank ``source``."""
        group = self._group_of(kind, source, self.rank)
        return self.world.receive(buffer, source, group, f"{self._me} got no {kind} from rank {source}")

    def sum_over(self, group: dist.ProcessGroup, tensor: Tensor, what: str) -> Message:
        """Start the all-reduce (sum) of ``tensor`` over ``group``, in place."""
        size = dist.get_world_size(group)
        # A ring all-reduce sends 2·(n − 1)/n of the tensor from every rank.
        self.bytes_sent += 2 * (size - 1) * tensor.numel() * tensor.element_size() // size
        what = f"rank {self.rank} lost a rank of {dist.get_process_group_ranks(group)} in {what}"
        return self.world.start(lambda: dist.all_reduce(tensor, group=group, async_op=True), tensor, group, what)

    def reset_bytes(self) -> int:
        """The bytes sent since the last call."""
        count, self.bytes_sent = self.bytes_sent, 0
        return count


class Message:
    """A message under way. Holds its tensor, because a buffer that is freed before it was sent is another's memory."""

    def __init__(
        self, work: dist.Work | None, tensor: Tensor, group: dist.ProcessGroup, complaint: str, timeout: timedelta
    ) -> None:
        self._work, self.tensor, self._group = work, tensor, group
        self._complaint, self._timeout = complaint, timeout

    def done(self) -> bool:
        """Whether `wait` would return at once. On a GPU it always would, but would hold the stream up: False."""
        return self._work is None or (not self.tensor.is_cuda and self._work.is_completed())

    def wait(self) -> None:
        """Wait for the end of the message (on a GPU: make the current stream wait).

        Raises:
            PeerLost: naming both ranks, if the peer is gone or silent for longer than the timeout.
        """
        if self._work is None:
            return
        try:
            if self.tensor.is_cuda and dist.get_backend(self._group) == "nccl":
                self._work.wait()  # with a limit it would hold the host; NCCL's own watchdog keeps the group's limit
            else:
                self._work.wait(self._timeout)
        except RuntimeError as error:
            if not tells_of_lost_peer(error):
                raise
            limit = f"{self._timeout.total_seconds():g} s (--timeout)"
            raise PeerLost(f"{self._complaint} within {limit}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _new_group(ranks: Sequence[int], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    # For ranks outside the group torch returns a number instead of a group; they never use it.
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=timeout, backend=backend))
