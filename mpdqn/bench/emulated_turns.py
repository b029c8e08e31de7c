"""`measure`: rows over emulated devices take turns in one pool of workers, and every turn becomes a record.

    round 0   row A: barrier, warm-up, updates …   row B: barrier, …        round 1  A B …

Within a turn no rank waits for another except for what an update itself sends: the time from update to update is that
of a training run. A run that was stopped goes on where it stopped, after the last whole round.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mpdqn.bench.emulated import FRAMES, MOST_LATE, WIDTH, Sleeper, emulated_network
from mpdqn.bench.emulated_row import EmulatedRow
from mpdqn.bench.single import random_batch
from mpdqn.bench.tables import spread, summarize
from mpdqn.bench.trace import chrome_trace
from mpdqn.exchange.reduction import Reduction
from mpdqn.files import write_whole
from mpdqn.launch import launch
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.pipeline.runtime import Pipeline
from mpdqn.pipeline.stage import build_stages
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.progress_bar import ProgressBar
from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records
from mpdqn.schedule.actions import FORWARD, Action
from mpdqn.timeline import Span, Timeline

SHOWN = 2
"""Updates of a turn, its last ones, whose timelines are kept."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What `measure` does.

    A turn is ``warmup`` ≥ 1 updates, then ``updates`` that count. ``folder`` gets ``records.jsonl`` and, of each row's
    last turn, ``trace-ROW.json`` with the measured and the simulated timeline of two updates.
    """

    experiment: str
    rows: tuple[EmulatedRow, ...]
    folder: Path
    rounds: int
    updates: int
    warmup: int = 1
    seed: int = 0
    smoke: bool = False

    def settings(self, row: EmulatedRow) -> dict[str, Value]:
        """The settings of the records of ``row``."""
        return {**row.settings, "updates": self.updates, "warmup": self.warmup, "smoke": self.smoke}

    def trace(self, row: EmulatedRow) -> Path:
        """Where the timelines of ``row`` are."""
        return self.folder / ("trace-" + re.sub(r"\W+", "-", row.name) + ".json")


def measure(turns: Turns) -> tuple[Record, ...]:
    """Run the rounds that the folder's records do not hold yet, and return all records.

    Each has ``step_s``, the mean time from update to update on the slowest rank; ``utilisation``, the share of it in
    which the emulated devices work, by their emulated times; ``simulated_step_s`` and ``simulated_utilisation``;
    ``excess_s``, by how much an action took longer than it emulates, on average; and ``shortened_s``, the seconds of an
    update that late wake-ups took off later sleeps (`Sleeper`), on the rank with the most.

    Raises:
        ValueError: if the folder holds records of other rows, settings or seed.
    """
    turns.folder.mkdir(parents=True, exist_ok=True)
    path = turns.folder / RECORDS
    kept = list(read_records(path)) if path.exists() else []
    wanted = {row.name: turns.settings(row) for row in turns.rows}
    for record in kept:
        if record.seed != turns.seed or dict(record.settings) != wanted.get(record.row):
            raise ValueError(
                f"{path} holds {record.row!r} with seed {record.seed} and settings {dict(record.settings)}; "
                "choose another --out"
            )
    have = {r: {record.row for record in kept if record.round == r} for r in {record.round for record in kept}}
    whole = [r for r, rows in have.items() if rows == wanted.keys()]
    if len(whole) < len(have):  # of a round that was broken off, the turns would lie hours apart
        kept = [record for record in kept if record.round in whole]
        write_whole(path, "".join(record.to_json() + "\n" for record in kept))
    missing = [r for r in range(turns.rounds) if r not in whole]
    if missing:
        ranks = max(row.pipeline for row in turns.rows)
        launch(_run, turns, missing, Environment.current(), num_workers=ranks)
        kept = list(read_records(path))
    return tuple(kept)


def shortened_note(records: Sequence[Record]) -> str:
    """Return the table's note on how far late wake-ups have shortened the sleeps of ``records``."""
    rule = (
        f"a sleep that ends late shortens the device's next ones, by at most {1e3 * MOST_LATE:g} ms each (a sleeping "
        "process needs a core to wake up, a device does not)"
    )
    found = [(r.values.get("shortened_s"), r.values["step_s"]) for r in records]
    known = [(s, step) for s, step in found if isinstance(s, float) and isinstance(step, float)]
    if len(known) < len(records):
        return f"{rule}; these records do not hold by how much in all: update and utilisation are to be read with that"
    milliseconds = summarize(1e3 * s for s, _ in known)
    return (
        f"{rule}: {spread(milliseconds, 1)} ms of an update on the device with the most, at most "
        f"{max(s / step for s, step in known):.1%} of it"
    )


def _run(turns: Turns, rounds: Sequence[int], environment: Environment) -> None:
    """The part of every rank."""
    torch.set_num_threads(1)
    with World.open() as world:
        drivers = {row.name: _driver(world, row, turns.seed) for row in turns.rows}
        order = [(r, row) for r in rounds for row in turns.rows]
        for r, row in ProgressBar(order, desc=turns.experiment, unit="turn", disable=world.rank != 0):
            world.barrier()
            driver = drivers[row.name]
            seen = world.to_first(None if driver is None else _take_turn(driver, turns))
            ranks = [rank for rank in seen if rank is not None]
            if world.rank == 0:
                measured = _joined(ranks)
                timelines = {"measured": measured, "simulated": row.simulated_timeline(SHOWN)}
                write_whole(turns.trace(row), chrome_trace(timelines))
                record = Record(
                    experiment=turns.experiment,
                    row=row.name,
                    round=r,
                    seed=turns.seed,
                    settings=turns.settings(row),
                    values=_values(row, ranks, measured, turns),
                    environment=environment,
                )
                append_records(turns.folder / RECORDS, [record])


@dataclass(frozen=True)
class _Seen:
    """What a rank saw in a turn, on the clock of the host: when each update ended, what the last ones did, and by how
    many seconds the sleeps of all updates that count were shortened."""

    ends: tuple[float, ...]
    spans: tuple[Span, ...]
    shortened_s: float


def _take_turn(driver: _Driver, turns: Turns) -> _Seen:
    ends, spans = [], []
    shortened = 0.0
    count = turns.warmup + turns.updates
    for k in range(count):
        if k == turns.warmup:
            shortened = driver.sleeper.shortened_s
        driver.update()
        ends.append(time.perf_counter())
        if k >= count - SHOWN:
            origin, step = driver.stopwatch.origin, k - (count - SHOWN)
            spans += [
                replace(s, start=origin + s.start, end=origin + s.end, step=step)
                for s in driver.stopwatch.timeline().spans
            ]
    return _Seen(tuple(ends), tuple(spans), driver.sleeper.shortened_s - shortened)


def _joined(ranks: Sequence[_Seen]) -> Timeline:
    """The last updates of all ranks, from their first start."""
    spans = [span for rank in ranks for span in rank.spans]
    first = min(span.start for span in spans)
    moved = [replace(span, start=span.start - first, end=span.end - first) for span in spans]
    return Timeline(tuple(sorted(moved, key=lambda s: (s.start, s.rank))), max(span.end for span in moved))


def _values(row: EmulatedRow, ranks: Sequence[_Seen], measured: Timeline, turns: Turns) -> dict[str, Value]:
    step_s = max(rank.ends[-1] - rank.ends[turns.warmup - 1] for rank in ranks) / turns.updates
    ends = zip(*(rank.ends[turns.warmup - 1 :] for rank in ranks), strict=True)
    actions = [(span, Action(span.stage, span.kind, span.microbatch)) for span in measured.spans if span.stage >= 0]
    return {
        "step_s": step_s,
        "utilisation": row.work_s / (row.pipeline * step_s),
        "simulated_step_s": row.simulated.step_s,
        "simulated_utilisation": row.simulated.mean_utilisation,
        "excess_s": sum(span.seconds - row.times.of(action) for span, action in actions) / len(actions),
        "shortened_s": max(rank.shortened_s for rank in ranks) / turns.updates,
        "each_step_s": [b - a for a, b in itertools.pairwise(map(max, ends))],
    }


class _Driver(Protocol):
    """One rank's part in a row."""

    @property
    def stopwatch(self) -> Stopwatch:
        """When the last update did what."""

    @property
    def sleeper(self) -> Sleeper:
        """The emulated device."""

    def update(self) -> None:
        """One update."""


def _driver(world: World, row: EmulatedRow, seed: int) -> _Driver | None:
    """This rank's part in ``row``; None if it has none. Collective over the world."""
    mesh = Mesh(world, row.plan, row.letters)
    if not mesh.member:
        return None
    return QLearning(mesh, row, seed) if row.agent else ForwardBackward(mesh, row, seed)


class QLearning:
    """The ordinary learner on two batches in turn, each announced one update early."""

    def __init__(self, mesh: Mesh, row: EmulatedRow, seed: int) -> None:
        assert row.agent is not None
        self.sleeper = Sleeper()
        self._learner = Learner(
            emulated_network(row.stages, self.sleeper),
            mesh=mesh,
            agent=row.agent,
            batch_size=row.batch_size,
            observation_shape=FRAMES,
            config=LearnerConfig(lookahead=1),
            table=row.table,
        )
        self._now, self._upcoming = (
            random_batch(FRAMES, WIDTH, row.batch_size, seed + k) if self._learner.owns_shards else None
            for k in range(2)
        )

    @property
    def stopwatch(self) -> Stopwatch:
        """When the last update did what."""
        return self._learner.stopwatch

    def update(self) -> None:
        """One update."""
        self._learner.learn(self._now, self._upcoming)
        self._now, self._upcoming = self._upcoming, self._now


class ForwardBackward:
    """A pipeline without an agent: F and B, a loss of the output alone, and the end of an update as the learner has it.

    That is where the ranks agree on the norm of all gradients, and each steps its optimizer.
    """

    def __init__(self, mesh: Mesh, row: EmulatedRow, seed: int) -> None:
        self._mesh = mesh
        micro_size = row.batch_size // row.num_microbatches
        self.sleeper = Sleeper()
        network = emulated_network(row.stages, self.sleeper)
        stages = build_stages(network, row.plan.partition, mesh.stages, FRAMES, micro_size, mesh.device)
        self._pipeline = Pipeline(mesh, stages, row.table, {}, row.plan.recompute)
        self._program = self._pipeline.program(row.table)
        self._parameters = {stage.index: list(stage.online.parameters()) for stage in stages}
        self._optimizer = torch.optim.SGD([p for own in self._parameters.values() for p in own], lr=1e-6)
        frames = random_batch(FRAMES, WIDTH, row.batch_size, seed).obs
        self._frames = {FORWARD: frames} if mesh.rank == mesh.first_rank else {}
        self.stopwatch = Stopwatch(mesh.rank, mesh.device)

    def update(self) -> None:
        """One update."""
        self.stopwatch.restart()
        self._optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []

        def loss_of(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            losses.append(q.square().mean())
            return losses[-1]

        reduction = Reduction(
            self._mesh, self._parameters, lambda: torch.stack([torch.zeros(()), *(x.detach() for x in losses)]).sum()
        )
        self._pipeline.run(self._program, self._frames, loss_of, self.stopwatch, after=self._progress(reduction))
        begin = self.stopwatch.now()
        reduction.finish()
        self.stopwatch.mark("exchange", begin)
        begin = self.stopwatch.now()
        self._optimizer.step()
        self.stopwatch.mark("optimizer", begin)
        self.stopwatch.stop()

    def _progress(self, reduction: Reduction) -> Callable[[Action], None]:
        def after(action: Action) -> None:
            if action in self._program.completes:
                reduction.start(self._program.completes[action])
            reduction.proceed()

        return after
