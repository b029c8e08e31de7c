"""What a micro-batch costs besides its work: every schedule beside torch's own, over two ranks.

    python -m experiments.schedule_overhead [--smoke]      about 4 minutes on 2 idle cores; run again, it goes on

The layers are so small that nothing is left but Python, autograd's calls and the messages. All contenders live in one
pool of two workers and take turns. Before they do, each must have the gradients of the chain without a pipeline.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from experiments.peers.overhead_table import overhead_table
from experiments.peers.torch_schedules import Step, raw_messages, torch_schedule
from mpdqn.bench.harness import Isolated, interleave
from mpdqn.cores import pin
from mpdqn.launch import launch
from mpdqn.mesh import Mesh, World
from mpdqn.pipeline.runtime import Pipeline
from mpdqn.pipeline.stage import Stage
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.records import RECORDS, read_records
from mpdqn.schedule import SCHEDULES, action_table, lane_of_stages

RANKS, WIDTH = 2, 8
RAW = "isend and irecv"
PAIRS = (
    ("gpipe", "torch ScheduleGPipe"),
    ("1f1b", "torch Schedule1F1B"),
    ("interleaved_1f1b", "torch ScheduleInterleaved1F1B"),
    ("looped_bfs", "torch ScheduleLoopedBFS"),
    ("zb_h1", "torch ScheduleInterleavedZeroBubble"),  # with one stage on a rank it is ZB-H1
    ("zbv", "torch ScheduleZBVZeroBubble"),
)
"""Our schedules, each with torch's own."""
SAME = {"td1f1b": "1f1b", "tdzb": "zb_h1"}
"""Schedules that differ from another only where there are no-gradient passes."""
BOUND = 5e-5
"""‖a − b‖₂ / ‖b‖₂ of float32 gradients."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/schedule_overhead")
    """Folder of the records."""
    num_microbatches: int = 32
    """m."""
    rows: int = 4
    """Rows of a micro-batch."""
    rounds: int = 9
    """Turns of each contender."""
    seconds: float = 1.5
    """Length of a turn."""
    seed: int = 0
    """Seed of weights and batch."""
    smoke: bool = False
    """One short round."""


def main(config: Config) -> None:
    """Measure every schedule and write the table."""
    m = config.num_microbatches
    assert set(SCHEDULES) == {ours for ours, _ in PAIRS} | set(SAME)
    assert all(
        action_table(name, RANKS, m).lanes == action_table(other, RANKS, m).lanes for name, other in SAME.items()
    )
    launch(work, config, sys.argv, num_workers=RANKS)
    table = overhead_table(read_records(config.out / RECORDS), PAIRS, RAW, SAME)
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


def work(config: Config, command: Sequence[str]) -> None:
    """What each of the two workers does: rank 0 calls the turns, rank 1 takes part."""
    sys.argv = list(command)  # the records shall tell how the user started this
    torch.set_num_threads(1)
    with World.open() as world:
        turns = {who: Turn(world, who, make(world, config)) for who, make in CONTENDERS.items()}
        if world.rank > 0:
            nothing: tuple[str, int] | None = None
            while (job := world.from_first(nothing)) is not None:
                who, count = job
                turns[who].take(count)
            return
        interleave(
            "schedule_overhead",
            f"p = {RANKS}, m = {config.num_microbatches}",
            turns,
            folder=config.out,
            rounds=1 if config.smoke else config.rounds,
            seconds=0.0 if config.smoke else config.seconds,
            seed=config.seed,
            settings={
                "num_microbatches": config.num_microbatches,
                "rows": config.rows,
                "width": WIDTH,
                "ranks": RANKS,
                "threads": 1,
                "smoke": config.smoke,
            },
        )
        world.from_first(None)


class Turn(Isolated):
    """A contender whose steps both ranks make together."""

    def __init__(self, world: World, name: str, step: Step) -> None:
        self._world, self._name, self._step = world, name, step
        self._cores = sorted(os.sched_getaffinity(0))

    def rate(self, seconds: float) -> float:
        """Steps per second of the slower rank, in a turn that rank 0 calls; at least two, after one to warm up."""
        count = max(2, math.ceil(seconds / self._call(1)))
        return count / self._call(count)

    def _call(self, count: int) -> float:
        self._world.from_first((self._name, count))
        return self.take(count)

    def take(self, count: int) -> float:
        """Make ``count`` steps; the seconds of the slower rank, on rank 0."""
        pin(self._cores, 1, self._world.rank)  # not earlier: the records shall tell how many cores there are
        begin = time.perf_counter()
        for _ in range(count):
            self._step()
        return max(self._world.to_first(time.perf_counter() - begin), default=0.0)

    def close(self) -> None:
        """Nothing: the worker's end is the turns' end."""


def loss(q: Tensor) -> Tensor:
    """A sum over rows, which micro-batches do not change."""
    return q.square().sum()


def task(config: Config, num_stages: int) -> tuple[nn.Sequential, Tensor]:
    """The same chain of layers and the same batch on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_stages)))
        return chain, torch.randn(config.num_microbatches * config.rows, WIDTH)


def ours(name: str, world: World, config: Config) -> Step:
    """A step of our schedule ``name``."""
    m, virtual = config.num_microbatches, SCHEDULES[name].virtual
    chain, batch = task(config, RANKS * virtual)
    partition = Partition(boundaries=tuple(range(len(chain) + 1)))
    parallelism = Parallelism(pipeline=RANKS, num_microbatches=m, schedule=name, virtual=virtual)
    plan = Plan.rectangular(partition, parallelism, lanes=lane_of_stages(name, RANKS, virtual))
    mesh = Mesh(world, plan, "")
    table = action_table(name, RANKS, m)
    example = torch.empty((config.rows, WIDTH), device="meta")
    stages = [
        Stage(
            index=j,
            online=chain[j : j + 1],
            target=copy.deepcopy(chain[j : j + 1]),
            example_input=example.clone().requires_grad_(j > 0),
            example_output=example.clone().requires_grad_(),
            value_dtype=example.dtype,
            value_shape=(WIDTH,),
        )
        for j in mesh.stages
    ]
    pipeline = Pipeline(mesh, stages, table, {})
    program, stopwatch = pipeline.program(table), Stopwatch(mesh.rank, mesh.device)
    frames = {"F": batch} if 0 in mesh.stages else {}

    def step() -> None:
        stopwatch.restart()
        pipeline.run(program, frames, lambda i, q, values: loss(q), stopwatch)

    return checked(name, step, chain, [chain[j] for j in mesh.stages], batch)


def torchs(name: str, world: World, config: Config) -> Step:
    """A step of torch's schedule ``name``, with as many stages, and on the same ranks, as ours beside it."""
    mine = next(own for own, its in PAIRS if its == name)
    virtual = SCHEDULES[mine].virtual
    chain, batch = task(config, RANKS * virtual)
    lanes = lane_of_stages(mine, RANKS, virtual)
    layers = list(chain)
    step = torch_schedule(
        name.removeprefix("torch "), layers, lanes, batch, config.num_microbatches, loss, world.message_group(name)
    )
    return checked(name, step, chain, [layers[j] for j, lane in enumerate(lanes) if lane == world.rank], batch)


def raw(world: World, config: Config) -> Step:
    """A step of messages without a schedule."""
    chain, batch = task(config, RANKS)
    step = raw_messages(list(chain), batch, config.num_microbatches, loss, world.message_group(RAW))
    return checked(RAW, step, chain, [chain[world.rank]], batch)


def checked(name: str, step: Step, chain: nn.Sequential, own: Sequence[nn.Module], batch: Tensor) -> Step:
    """``step`` from gradients of zero, once it is seen to give this rank's layers the gradients of the whole chain."""
    alone = copy.deepcopy(chain)
    torch.autograd.backward(loss(alone(batch)))
    wanted = {name: p.grad for name, p in alone.named_parameters()}
    parameters = [p for layer in own for p in layer.parameters()]

    def fresh() -> None:
        for p in parameters:
            p.grad = None
        step()

    for _ in range(2):  # torch infers shapes in its first step
        fresh()
    mine = {id(p): name for name, p in chain.named_parameters()}
    a = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    b = torch.cat([g.flatten() for p in parameters if (g := wanted[mine[id(p)]]) is not None])
    error = float((a - b).norm() / b.norm()) if a.shape == b.shape else math.inf
    assert error <= BOUND, f"{name}: gradients differ by {error:.1e} from those without a pipeline"
    return fresh


def _contenders() -> Iterator[tuple[str, Callable[[World, Config], Step]]]:
    for mine, its in PAIRS:
        yield mine, functools.partial(ours, mine)
        yield its, functools.partial(torchs, its)
    yield RAW, raw


CONTENDERS = dict(_contenders())

if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
