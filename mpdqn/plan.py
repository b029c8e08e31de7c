"""The `Plan`: which layers run where, in what order, on how many micro-batches.

Everything meets in this one frozen value: the profiler feeds it, the pipeline executes it, the tables print it. Only
the standard library is imported here, so that deciders can work without torch.

    boundaries  0        5        9   = num_layers          placement (d = 2 replicas × p = 2 stages)
                | stage 0 | stage 1 |                          stage 0 -> ranks (0, 2)
                                                               stage 1 -> ranks (1, 3)
                                                               replica r is column r: (0, 1) and (2, 3)
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer costs on one device for one batch.

    Times are milliseconds, sizes are bytes. ``activation_bytes`` is what autograd keeps for the backward pass because
    of this layer and no layer before it keeps already, parameters and buffers apart; a stage that starts after layer a
    keeps at most ``boundary_bytes`` of layer a more, its received input. ``boundary_bytes`` is what crosses a cut
    placed after this layer.
    """

    name: str
    forward_ms: float
    backward_input_ms: float
    backward_weight_ms: float
    parameter_bytes: int
    activation_bytes: int
    boundary_bytes: int

    @property
    def backward_ms(self) -> float:
        """Time of the whole backward pass in ms: the gradient of the input and of the weights."""
        return self.backward_input_ms + self.backward_weight_ms


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The layer costs of one network, with the circumstances under which they were measured."""

    network: str
    batch_size: int
    device: str
    threads: int
    memory_format: str
    layers: tuple[LayerCost, ...]

    @property
    def forward_ms(self) -> float:
        """Forward time of the whole network in ms."""
        return sum(layer.forward_ms for layer in self.layers)

    @property
    def backward_ms(self) -> float:
        """Backward time of the whole network in ms."""
        return sum(layer.backward_ms for layer in self.layers)

    def to_json(self) -> str:
        """This profile as JSON text; `from_json` reads it back to an equal value."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The profile that `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        return cls(**data | {"layers": tuple(LayerCost(**layer) for layer in data["layers"])})


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Where a chain of layers is cut: stage j holds the layers ``boundaries[j]`` up to ``boundaries[j + 1]``.

    Raises:
        ValueError: unless ``0 = boundaries[0] < … < boundaries[p]``.
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        b = self.boundaries
        if len(b) < 2 or b[0] != 0 or any(left >= right for left, right in itertools.pairwise(b)):
            raise ValueError(f"boundaries {b} do not rise strictly from 0; each stage needs at least one layer")

    @property
    def num_stages(self) -> int:
        """p, the number of stages."""
        return len(self.boundaries) - 1

    @property
    def num_layers(self) -> int:
        """n, the number of layers."""
        return self.boundaries[-1]

    def layers_of(self, stage: int) -> range:
        """The indices of the layers of stage ``stage``."""
        return range(self.boundaries[stage], self.boundaries[stage + 1])


@dataclass(frozen=True, kw_only=True)
class Link:
    """What carries a message from one rank to another: ``latency_s`` seconds plus its bytes at ``bytes_per_s``.

    ``posted_ahead``: whether the receiver asks for a message before it needs it, so that the transfer overlaps with its
    work, as the runtime does over gloo; over NCCL it asks when the action comes. Sends are never waited for.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    posted_ahead: bool = True


RECOMPUTATION = ("none", "boundaries", "all")
"""How much of a stage's forward is computed again in its backward, to save memory: nothing; what lies inside its layers
(their outputs are kept); everything (only the stage's input is kept)."""


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """d data-parallel replicas × p pipeline ranks of v stages each, m micro-batches a step, in a schedule's order.

    Raises:
        ValueError: if one of the four counts is below 1.
    """

    data: int = 1
    pipeline: int = 1
    num_microbatches: int = 1
    schedule: str = "gpipe"
    virtual: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "pipeline", "num_microbatches", "virtual"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")

    @property
    def num_stages(self) -> int:
        """p·v, the number of stages."""
        return self.pipeline * self.virtual

    def check_batch(self, batch_size: int) -> None:
        """Raise ValueError unless the batch of ``batch_size`` transitions cuts into d·m equal micro-batches."""
        d, m = self.data, self.num_microbatches
        if batch_size < 1 or batch_size % (d * m):
            nearest = max(1, round(batch_size / (d * m))) * d * m
            raise ValueError(f"batch_size {batch_size} is not a multiple of d·m = {d}·{m}; try {nearest}")

    def check_shards(self, num_shards: int, batch_size: int) -> None:
        """Raise ValueError unless the replicas own whole virtual shards and each shard gives an equal part."""
        if num_shards < 1 or num_shards % self.data:
            nearest = max(1, round(num_shards / self.data)) * self.data
            raise ValueError(
                f"{num_shards} virtual shards cannot be dealt to d = {self.data} replicas; try --num-shards {nearest}"
            )
        if batch_size % num_shards:
            nearest = max(1, round(batch_size / num_shards)) * num_shards
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of the {num_shards} virtual shards; try {nearest}"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way of training a network: the cut, the parallelism and the placement of stages on ranks.

    ``placement[j]`` lists the ranks that hold stage j, one per replica; a rank may hold several stages of a replica
    (that is how several stages run in one process). d × p on d·p ranks is the rectangular case, `rectangular`.
    ``recompute[j]`` is one of `RECOMPUTATION`, for each stage.

    Raises:
        ValueError: if placement or recomputation do not match the partition and the parallelism.
    """

    partition: Partition
    parallelism: Parallelism
    placement: tuple[tuple[int, ...], ...]
    recompute: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stages, p, d = self.partition.num_stages, self.parallelism.num_stages, self.parallelism.data
        if not stages == p == len(self.placement):
            raise ValueError(
                f"the partition has {stages} stages, the parallelism p·v = {p} and the placement "
                f"{len(self.placement)} rows; the three must agree"
            )
        object.__setattr__(self, "recompute", tuple(self.recompute) or (RECOMPUTATION[0],) * stages)
        if len(self.recompute) != stages or not set(self.recompute) <= set(RECOMPUTATION):
            raise ValueError(
                f"recompute {self.recompute} must name one of {', '.join(RECOMPUTATION)} for each of {stages} stages"
            )
        for stage, ranks in enumerate(self.placement):
            if len(ranks) != d:
                raise ValueError(
                    f"stage {stage} is placed on {len(ranks)} ranks {ranks} but there are d = {d} replicas"
                )
        owners = [set(self.replica(r)) for r in range(d)]
        if len(set().union(*owners)) != sum(map(len, owners)):
            raise ValueError(f"placement {self.placement} gives one rank to two replicas; a rank serves one replica")

    @classmethod
    def rectangular(
        cls,
        partition: Partition,
        parallelism: Parallelism,
        *,
        lanes: Sequence[int] = (),
        recompute: tuple[str, ...] = (),
    ) -> Self:
        """d × p on d·p ranks: replica r owns the p consecutive ranks from r·p on.

        ``lanes[j]`` is the rank of stage j within its replica, 0 … p − 1; stages are dealt in turn if it is not given.
        """
        d, p = parallelism.data, parallelism.pipeline
        lanes = lanes or [stage % p for stage in range(parallelism.num_stages)]
        placement = tuple(tuple(r * p + lane for r in range(d)) for lane in lanes)
        return cls(partition=partition, parallelism=parallelism, placement=placement, recompute=recompute)

    @classmethod
    def stacked(cls, partition: Partition, parallelism: Parallelism, *, recompute: tuple[str, ...] = ()) -> Self:
        """d × p on d ranks: replica r runs all its stages in the process of rank r, as on one GPU."""
        placement = (tuple(range(parallelism.data)),) * parallelism.num_stages
        return cls(partition=partition, parallelism=parallelism, placement=placement, recompute=recompute)

    def replica(self, index: int) -> tuple[int, ...]:
        """The rank of each stage of replica ``index``, in stage order."""
        return tuple(ranks[index] for ranks in self.placement)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that takes part, ascending."""
        return tuple(sorted({rank for ranks in self.placement for rank in ranks}))

    def replica_of(self, rank: int) -> int:
        """The replica that ``rank`` serves; ValueError if it serves none."""
        for index in range(self.parallelism.data):
            if rank in self.replica(index):
                return index
        raise ValueError(f"rank {rank} is not among the ranks {self.ranks} of this plan")

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, ascending; empty if it takes no part."""
        return tuple(j for j, ranks in enumerate(self.placement) if rank in ranks)

    def to_json(self) -> str:
        """This plan as JSON text; `from_json` reads it back to an equal value."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        return cls(
            partition=Partition(boundaries=tuple(data["partition"]["boundaries"])),
            parallelism=Parallelism(**data["parallelism"]),
            placement=tuple(tuple(ranks) for ranks in data["placement"]),
            recompute=tuple(data.get("recompute", ())),
        )
