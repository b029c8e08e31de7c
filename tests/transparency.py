"""Train each layout for a few updates: what the transparency tests, the teeth and the GPU tests share.

A *case* is one layout of one update rule on one network. The ranks of a worker pool run it; the single process at m = 1
is run once for all cases of its update rule (`References`); `tests.comparator` compares the two traces.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpdqn.dqn.agents import make_agent
from mpdqn.dqn.batch import Batch
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.networks import NoisyLinear, make_network, output_shape, set_memory_format
from mpdqn.networks.heads import DuelingHead
from mpdqn.partition import balance_costs
from mpdqn.plan import RECOMPUTATION, Parallelism, Partition, Plan
from mpdqn.randomness import keyed_seed
from mpdqn.replay import VirtualShards
from mpdqn.schedule import SCHEDULES, lane_of_stages

ACTIONS = 5
UPDATES = 5
ACTION_DIMS = 2
"""D of agents with branching."""
FRAMES = {
    "nature": (4, 44, 44),
    "impala": (4, 24, 24),
    "resnet18": (4, 32, 32),
    "resnet34": (4, 32, 32),
    "resnet50": (4, 32, 32),
    "resnet101": (4, 32, 32),
    "tiny": (2, 12, 12),
}

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout to be compared. ``head`` is the agent's, unless another is named.

    ``placement``: ``stacked`` runs all stages of a replica in one process, ``interleaved`` deals the stages of one
    replica to two ranks in turn.
    """

    family: str = "nature"
    data: int = 1
    pipeline: int = 1
    schedule: str = "gpipe"
    m: int = 1
    shards: int = 4
    optimizer: str = "adam"
    agent: str = "double_dqn"
    head: str = ""
    placement: str = "rectangular"
    dtype: str = "float64"
    memory_format: str = "contiguous"
    virtual: int = 1
    recompute: str = "none"
    lookahead: int = 0
    accumulation: int = 1
    target_tau: float = 1.0
    target_period: int = 3
    batch_size: int = 16
    prioritized: bool = False

    def __str__(self) -> str:
        layout = f"dp{self.data}xpp{self.pipeline}-{self.schedule}+{self.placement}/m{self.m}"
        layout += f"+v{self.virtual}" * (self.virtual > 1) + f"+{self.recompute}" * (self.recompute != "none")
        layout += f"+a{self.accumulation}" * (self.accumulation > 1) + "+ahead" * self.lookahead
        rule = f"{self.agent}-{self.optimizer}-V{self.shards}-B{self.batch_size}"
        rule += f"-n{self.target_period}-tau{self.target_tau:g}" + "-per" * self.prioritized
        return f"{self.family}-{self.head or 'own'}-{layout}-{rule}-{self.dtype}-{self.memory_format}"

    @property
    def ranks(self) -> int:
        """How many ranks the layout needs."""
        if self.placement == "interleaved":
            return 2
        return self.data * (1 if self.placement == "stacked" else self.pipeline)

    def reference(self) -> Case:
        """The single process, m = 1, of the same update rule."""
        layout = {"data": 1, "pipeline": 1, "schedule": "gpipe", "m": 1, "virtual": 1, "placement": "rectangular"}
        return replace(self, **layout, recompute="none", accumulation=1)


def tiny_case(schedule: str, *, data: int = 1, pipeline: int = 2, m: int = 4, **options: Any) -> Case:
    """A case on the tiny network, with the smallest batch that its layout, its shards and its sums can do with."""
    options = {"virtual": SCHEDULES[schedule].virtual} | options
    step = math.lcm(4, 2 * m, data * m * options.get("accumulation", 1))
    size = step * math.ceil(4 * data / step)
    return Case(family="tiny", data=data, pipeline=pipeline, schedule=schedule, m=m, batch_size=size, **options)


@dataclass
class Trace:
    """What a run leaves on one rank, by update; tensors are those of the rank's stages, by global name."""

    replica: int = -1
    gradients: list[Tensors] = field(default_factory=list)
    td_errors: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    priorities: list[Tensor] = field(default_factory=list)
    change: Tensors = field(default_factory=dict)


def filled_shards(case: Case, seed: int = 7) -> VirtualShards:
    """Virtual shards full of random frames, rewards, and episode ends of both kinds."""
    frames, steps, envs = FRAMES[case.family], 24, 2
    shards = VirtualShards(
        observation_shape=frames,
        num_shards=case.shards,
        capacity=steps * envs * case.shards,
        envs_per_shard=envs,
        seed=seed,
        stack=frames[0],
        n_step=2,
        discount=0.9,
        prioritization=Prioritization(alpha=0.6, beta=0.5) if case.prioritized else None,
    )
    draw = torch.Generator().manual_seed(keyed_seed("test", seed))
    n = envs * case.shards

    def observation() -> Tensor:
        return torch.randint(256, (n, *frames), dtype=torch.uint8, generator=draw)

    now = observation()
    for _ in range(steps):
        after = observation()
        ends = torch.rand(2, n, generator=draw) < 0.1
        shards.append(
            observation=now,
            action=torch.randint(ACTIONS, (n,), generator=draw),
            reward=torch.randn(n, generator=draw),
            terminated=ends[0],
            truncated=ends[1],
            next_observation=after,
        )
        now = after
    return shards


def build(world: World, case: Case, batch_size: int, alone: bool = False) -> Learner | None:
    """This rank's learner; collective. ``alone``: every rank builds a single process of its own."""
    frames = FRAMES[case.family]
    options: dict[str, Any] = {"width": 0.25, "fc": 64} if case.family == "impala" else {"fc": 64}
    agent = make_agent(case.agent)
    options |= agent.head_options(ACTION_DIMS) | ({"head": case.head} if case.head else {})
    if case.family == "tiny":
        network = tiny_network(frames, **options)
    else:
        network = make_network(case.family, frames, ACTIONS, seed=3, **options)
    network = network.to(world.device, getattr(torch, case.dtype))
    set_memory_format(network, case.memory_format)
    costs = [1.0 + sum(p.numel() for p in layer.parameters()) ** 0.5 for layer in network]
    trained = [any(True for _ in layer.parameters()) for layer in network]
    stages = case.pipeline * case.virtual
    partition = Partition(boundaries=balance_costs(costs, stages, required=trained))
    parallelism = Parallelism(
        data=case.data, pipeline=case.pipeline, num_microbatches=case.m, schedule=case.schedule, virtual=case.virtual
    )
    if alone:
        plans = [Plan(partition=partition, parallelism=parallelism, placement=((r,),)) for r in range(world.size)]
    else:
        plans = [_plan(partition, parallelism, case)]
    mesh = next((mesh for mesh in [Mesh(world, plan, agent.letters) for plan in plans] if mesh.member), None)
    if mesh is None:
        return None
    config = LearnerConfig(
        optimizer=case.optimizer,
        learning_rate=1e-2 if case.optimizer == "adam" else 1e-1,
        target_period=case.target_period,
        target_tau=case.target_tau,
        max_grad_norm=0.05,
        lookahead=case.lookahead,
        accumulation=case.accumulation,
    )
    return Learner(network, mesh=mesh, agent=agent, batch_size=batch_size, observation_shape=frames, config=config)


def _plan(partition: Partition, parallelism: Parallelism, case: Case) -> Plan:
    stages = parallelism.num_stages
    recompute = (case.recompute,) * stages
    if case.recompute == "mixed":
        recompute = tuple(RECOMPUTATION[stage % 3] for stage in range(stages))
    if case.placement == "interleaved":
        ranks = tuple((stage % 2,) for stage in range(stages))
        return Plan(partition=partition, parallelism=parallelism, placement=ranks, recompute=recompute)
    if case.placement == "stacked":
        return Plan.stacked(partition, parallelism, recompute=recompute)
    lanes = lane_of_stages(case.schedule, case.pipeline, case.virtual)
    return Plan.rectangular(partition, parallelism, lanes=lanes, recompute=recompute)


def tiny_network(
    frames: tuple[int, int, int],
    *,
    head: str = "plain",
    noisy: bool = False,
    num_atoms: int = 1,
    branches: int = 0,
    **unused: Any,
) -> nn.Sequential:
    """Twelve layers with parameters, for the pipelines of eight stages: normalised, strided, with views between."""
    linear, shape = NoisyLinear if noisy else nn.Linear, output_shape(ACTIONS, num_atoms, branches)

    def end() -> Iterator[nn.Module]:
        if head == "dueling":
            yield DuelingHead(12, 8, ACTIONS, noisy=noisy, num_atoms=num_atoms, branches=branches)
            return
        yield linear(12, math.prod(shape))
        if len(shape) > 1:
            yield nn.Unflatten(1, shape)

    class Frames(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(channels, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(x.to(self.convolution.weight.dtype) / 255)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.convolution = nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.convolution(torch.relu(self.norm(x)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(
            Frames(frames[0]),
            nn.ReLU(),
            *(Residual() for _ in range(6)),
            nn.Conv2d(6, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(4 * 36, 16),
            nn.ReLU(),
            linear(16, 16),
            nn.Tanh(),
            linear(16, 12),
            nn.ReLU(),
            *end(),
        )


def owned_shards(case: Case, replica: int) -> range:
    """The shards that ``replica`` owns."""
    share = case.shards // case.data
    return range(replica * share, (replica + 1) * share)


def run_case(world: World, case: Case, *, updates: int = UPDATES, alone: bool = False) -> Trace:
    """Train ``updates`` updates of ``case``; collective over the world."""
    learner = build(world, case, case.batch_size, alone)
    trace = Trace()
    # The ranks of the first stages, which agree on the least probability of all shards.
    owners = (
        world.group([r * case.pipeline for r in range(case.data)], "gloo") if case.prioritized and not alone else None
    )
    if learner is None:
        return trace
    trace.replica = learner.mesh.replica
    shards = filled_shards(case)
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}

    def sample(update: int) -> Batch | None:
        if not learner.owns_shards:
            return None
        draw = shards.draw(case.batch_size, update, owned_shards(case, trace.replica))
        lowest = torch.tensor(draw.lowest, dtype=torch.float64)
        if owners is not None and case.data > 1:
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=owners)
        batch = shards.gather(draw, float(lowest))
        if learner.agent.branching:
            batch = replace(batch, action=torch.stack([batch.action, (batch.action + batch.index) % ACTIONS], dim=1))
        if case.prioritized:
            return batch
        # Uniform replay gives equal weights; unequal ones must travel, too.
        return replace(batch, weight=0.25 + (batch.index % 5) / 4)

    batch = sample(0)
    for update in range(updates):
        upcoming = sample(update + 1)
        step = learner.learn(batch, upcoming if case.lookahead else None)
        if case.prioritized and batch is not None and step.td_errors is not None:
            owned = owned_shards(case, trace.replica)
            shards.return_td_errors(batch.index, step.td_errors, owned)
            trace.priorities.append(torch.cat([shards[v].tensors()["priority"].clone() for v in owned]))
        batch = upcoming
        trace.gradients.append({n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None})
        if step.td_errors is not None:
            trace.td_errors.append(step.td_errors.clone())
        trace.norms.append(step.grad_norm.item())
        trace.losses.append(step.loss.item())
    trace.change = {name: p.detach() - start[name] for name, p in learner.named_parameters()}
    return trace


def run_reference(world: World, case: Case, *, updates: int = UPDATES) -> Trace:
    """The single process of ``case``, on every rank of ``world`` by itself; collective."""
    return run_case(world, case.reference(), updates=updates, alone=True)


class References:
    """Traces of the single process in files, each computed once: the ranks of every pool read what they compare.

    Args:
        world: a world of one, which computes them.
        folder: where the files are.
        updates: how many updates each has.
    """

    def __init__(self, world: World, folder: Path, updates: int = UPDATES) -> None:
        self._world, self._folder, self._updates, self._numbers = world, folder, updates, itertools.count()
        self._paths: dict[Case, Path] = {}

    def of(self, cases: Iterable[Case]) -> dict[Case, Path]:
        """Return the file with the trace of the single process of each of ``cases``."""
        found = {}
        for case in cases:
            single = case.reference()
            if single not in self._paths:
                self._paths[single] = self._folder / f"{next(self._numbers)}.pt"
                torch.save(run_case(self._world, single, updates=self._updates), self._paths[single])
            found[case] = self._paths[single]
        return found

    def keep(self, cases: Iterable[Case]) -> None:
        """Delete all but those of ``cases``: the traces of a large network take gigabytes."""
        for single in self._paths.keys() - {case.reference() for case in cases}:
            self._paths.pop(single).unlink()


def read_trace(path: Path) -> Trace:
    """Return a trace of `References`; its tensors are read when they are used."""
    trace: Trace = torch.load(path, mmap=True, weights_only=False)
    return trace
