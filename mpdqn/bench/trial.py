"""`run_trials`: the part of a comparison that runs on every rank, alike.

rank 0   collect ─ choose memory format ─ profile ─┐
all ranks             shards, profile, precision ──┴─ for each round: A B C A B C …
                                                      (check in the first round; build, warm up, time, take down)
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from mpdqn.actors import collect
from mpdqn.allocator import keep_freed_memory
from mpdqn.arrangement import Arrangement, NothingFits
from mpdqn.bench.config import Job
from mpdqn.bench.costs import cost_table
from mpdqn.bench.gradient_check import Probe, errors, probe_config
from mpdqn.bench.measure import RankMeasurement, combine
from mpdqn.bench.trace import chrome_trace
from mpdqn.bench.turn import Turn
from mpdqn.cores import memory_per_rank, pin, reset_peak_memory
from mpdqn.files import write_whole
from mpdqn.launched import launched_local_world_size
from mpdqn.layouts import Layout
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.networks import MemoryFormat, choose_memory_format, set_memory_format
from mpdqn.partition import profile
from mpdqn.pipeline.acceleration import Acceleration
from mpdqn.plan import Profile
from mpdqn.progress_bar import ProgressBar
from mpdqn.records import RECORDS, TABLES, TRACES, Record, Value, append_records, read_records, without_places
from mpdqn.replay import VirtualShards
from mpdqn.timeline import LATE, Timeline
from mpdqn.workload.acceleration import agree_on_acceleration

PROFILE_REPEATS = 9


def run_trials(job: Job) -> tuple[Path, tuple[Record, ...]]:
    """Measure every layout of ``job``; collective over the world that the launcher started.

    Rank 0 makes the run's folder and appends each record to its ``records.jsonl`` as soon as it is taken.

    Returns:
        the folder and all records, on every rank.

    Raises:
        NothingFits: on every rank, if a layout does not fit into memory; there is no folder then.
    """
    keep_freed_memory()
    with World.open(job.config.device, job.config.timeout) as world:
        trials = Trials(world, job)
        trials.prepare()
        folder = world.from_first(_new_folder(job) if world.rank == 0 else Path())
        trials.run(folder)
        return folder, world.from_first(tuple(read_records(folder / RECORDS)) if world.rank == 0 else ())


def run_or_refuse(job: Job) -> tuple[Path, tuple[Record, ...]] | NothingFits:
    """`run_trials` for a pool of workers, from where bad input comes back as such and not as the worker's failure."""
    try:
        return run_trials(job)
    except NothingFits as error:
        return error.with_traceback(None)


def _new_folder(job: Job) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "_", f"{stamp}-{job.config.env}-{job.network_name}")
    for suffix in ("", *(f"-{count}" for count in range(2, 1000))):  # two runs may start within a second
        with contextlib.suppress(FileExistsError):
            folder = job.config.out / (name + suffix)
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(f"{job.config.out / name} and 998 more exist; choose another --out")


class Trials:
    """The trials of one comparison, as one rank sees them.

    Attributes:
        shards: replay, the same on every rank, once `prepare` has filled it.
    """

    def __init__(self, world: World, job: Job) -> None:
        self._world, self._job, self._config = world, job, job.config
        self._agent = job.workload.agent
        # A step runs each layer forward once with a graph and once more for every no-gradient pass.
        self._forward_passes = 1 + len(self._agent.passes)
        self._first = world.rank == 0
        self._num_cores = len(job.cores)

    def prepare(self) -> None:
        """Collect transitions, measure the layers and arrange every layout."""
        self.shards = self._collect()
        self._profile = self._measure_layers()
        self._accelerations = self._find_accelerations()
        self._arranged = {layout: self._arrange(layout) for layout in self._job.layouts}

    def run(self, folder: Path) -> None:
        """Measure every layout in every round, once prepared; rank 0 writes to ``folder``."""
        if self._first:
            cuts = [arranged.plans[0].partition for arranged in self._arranged.values()]
            table = cost_table(self._profile, cuts, self._forward_passes)
            print(table.markdown(), flush=True)
            about = {
                "environment": asdict(self._job.environment),
                "config": asdict(self._config),
                "network": self._job.network_name,
            }
            write_whole(folder / "environment.json", json.dumps(without_places(about), indent=1, default=str) + "\n")
            write_whole(folder / "profile.json", self._profile.to_json() + "\n")
            (folder / TABLES).mkdir()
            for layout, arranged in self._arranged.items():
                write_whole(folder / TABLES / f"{_file_name(layout)}.csv", arranged.table.to_csv())
        reference = self._reference()
        exactness: dict[Layout, dict[str, Value]] = {}
        turns = [(r, layout) for r in range(self._config.rounds) for layout in self._job.layouts]
        for r, layout in ProgressBar(turns, desc="trials", unit="trial", disable=not self._first):
            self._world.activity.set(f"preparing {layout.name}")
            if r == 0:
                exactness[layout] = self._check(layout, reference)
            self._world.activity.set(f"measuring {layout.name}")
            ranks = self._trial(layout)
            if self._first:
                values = combine(self._arranged[layout], ranks, self._config.batch_size)
                record = Record(
                    experiment="compare",
                    row=layout.name,
                    round=r,
                    seed=self._config.seed,
                    settings=self._settings(layout),
                    values={**values, **exactness[layout]},
                    environment=self._job.environment,
                )
                append_records(folder / RECORDS, [record])
            if self._config.trace and r == self._config.rounds - 1:
                self._trace(layout, folder)

    def _collect(self) -> VirtualShards:
        """Real transitions in every shard: rank 0 plays, the others get whole shards."""
        config, shards = self._config, self._job.workload.make_shards()
        pin(list(self._job.cores), self._num_cores, 0)
        if self._first:
            network = self._job.make_network().to(self._world.device)
            stats = collect(
                network,
                config.env,
                shards,
                num_transitions=config.transitions,
                epsilon=config.epsilon,
                seed=config.seed,
                greedy=self._agent.greedy,
                progress=True,
                device=self._world.device,
            )
            print(
                f"collected {stats.transitions} transitions ({stats.frames} frames) of {config.env} in "
                f"{stats.seconds:.1f} s: {stats.episodes} episodes ended"
                f"{f', mean return {stats.mean_return:.1f}' if stats.episodes else ''}; "
                f"{len(shards)} transitions can be sampled",
                flush=True,
            )
        state = {name: tensor.clone() for name, tensor in shards.state().items()}
        for tensor in state.values():
            dist.broadcast(tensor, src=0, group=self._world.lobby)
        shards.load_state(state)
        return shards

    def _measure_layers(self) -> Profile:
        """Memory format and layer costs as rank 0 measures them, on the cores that one rank of a pipeline has."""
        text = ""
        if self._first:
            pipelines = [layout for layout in self._job.layouts if layout.pipeline > 1]
            threads = min((layout.threads for layout in pipelines), default=self._num_cores)
            pin(list(self._job.cores), threads, 0)
            network = self._job.make_network().to(self._world.device)
            frames = self.shards.sample(self._config.batch_size, 0).obs.to(self._world.device)
            part = frames[: max(1, len(frames) // self._job.num_microbatches)]
            set_memory_format(network, choose_memory_format(network, part, repeats=PROFILE_REPEATS))
            text = profile(
                network, part, name=self._job.network_name, repeats=PROFILE_REPEATS, accumulate=len(part) < len(frames)
            ).to_json()
        self._world.barrier()
        return Profile.from_json(self._world.from_first(text))

    def _memory_limit(self, layout: Layout) -> float:
        """Bytes that a rank of ``layout`` may use."""
        here = min(layout.ranks, launched_local_world_size())
        return self._config.memory_limit * 2**30 or self._world.from_first(memory_per_rank(here, self._world.device))

    def _arrange(self, layout: Layout, memory_bytes: float | None = None) -> Arrangement:
        config = self._config
        return Arrangement.of(
            layout,
            self._profile,
            self._agent,
            batch_size=config.batch_size,
            lookahead=config.lookahead,
            recompute=config.recompute,
            memory_bytes=self._memory_limit(layout) if memory_bytes is None else memory_bytes,
        )

    def _find_accelerations(self) -> dict[Layout, Acceleration]:
        """Precision and compilation of each layout, as `mpdqn train` would choose them; measured once for each size."""
        network, found = self._make_network(), dict[int, Acceleration]()
        chosen = {}
        for layout in self._job.layouts:
            frames = self._job.workload.micro_batch_frames(layout)
            if len(frames) not in found:
                found[len(frames)] = agree_on_acceleration(
                    self._world, network, frames, precision=self._config.precision, compile=self._config.compile
                )
            chosen[layout] = found[len(frames)]
        return chosen

    def _reference(self) -> Probe | None:
        """Gradients and TD errors of the single process, on rank 0."""
        with self._build(Layout(threads=self._num_cores), probe=True) as turn:
            return None if turn is None else Probe.of(turn)

    def _check(self, layout: Layout, reference: Probe | None) -> dict[str, Value]:
        """On rank 0: how far gradients and TD errors are from those of the single process on the same batches."""
        with self._build(layout, probe=True) as turn:
            probe = None if turn is None else Probe.of(turn)
        return errors(self._world, layout, probe, reference)

    def _trial(self, layout: Layout) -> list[RankMeasurement]:
        """One turn of ``layout``: build, warm up, time, take down. On rank 0 what every rank measured."""
        reset_peak_memory(self._world.device)
        with self._build(layout) as turn:
            late_s = 0.0
            if turn is not None:
                turn.learn(0)  # nothing was announced before it: its target passes run late
                late_s = turn.learner.timeline().busy(self._world.rank, LATE)
            self._world.barrier()
            measured = turn.measure(self._config.steps, late_s) if turn is not None else None
        return [rank for rank in self._world.to_first(measured) if rank is not None]

    def _trace(self, layout: Layout, folder: Path) -> None:
        """Two more updates of ``layout``, on rank 0 written with what the simulator expected of them."""
        with self._build(layout) as turn:
            measured = [] if turn is None else turn.trace(3)
        parts = [timeline for rank in self._world.to_first(measured) for timeline in rank[1:]]
        if self._first:
            whole = Timeline.joined(parts)
            update_s = whole.busy(0, "optimizer") / 2
            (folder / TRACES).mkdir(exist_ok=True)
            simulated = self._arranged[layout].simulated(2, update_s)
            write_whole(
                folder / TRACES / f"{_file_name(layout)}.json",
                chrome_trace({"measured": whole, "simulated": simulated}),
            )

    def _make_network(self, stream: int = 0) -> nn.Sequential:
        """The network in the memory format that was chosen for all rows."""
        network = self._job.make_network(stream)
        set_memory_format(network, cast(MemoryFormat, self._profile.memory_format))
        return network

    @contextlib.contextmanager
    def _build(self, layout: Layout, *, probe: bool = False) -> Iterator[Turn | None]:
        """This rank's part in ``layout``, pinned to its share of the cores, as a context; None without a part.

        A ``probe`` is made to show differences: in plain float32 (see `mpdqn.bench.gradient_check`), and its target
        network has other weights than the online one, so that the passes cannot stand in for one another.
        """
        # The reference need not be a row, and no limit is meant for it then.
        arranged = self._arranged.get(layout) or self._arrange(layout, math.inf)
        meshes = [Mesh(self._world, plan, self._agent.letters) for plan in arranged.plans]
        mesh = next((mesh for mesh in meshes if mesh.member), None)
        if mesh is None:
            yield None
            return
        pin(list(self._job.cores), layout.threads, self._world.rank)
        acceleration = Acceleration() if probe else self._accelerations[layout]
        if self._world.device.type == "cuda":
            acceleration.set_products()
        if acceleration.compiled:  # what earlier turns compiled is not used again, but would be kept
            torch.compiler.reset()
        config = self._job.workload.learner_config(lookahead=self._config.lookahead)
        learner = Learner(
            self._make_network(),
            mesh=mesh,
            agent=self._agent,
            batch_size=self._config.batch_size,
            observation_shape=self._job.spec.observation_shape,
            config=probe_config(config) if probe else config,
            table=arranged.table,
            acceleration=acceleration,
        )
        if probe:
            weights = self._job.make_network(stream=1).state_dict()
            for stage in learner.stages:
                stage.target.load_state_dict({name: weights[name] for name in stage.target.state_dict()})
        share = self._config.num_shards // layout.data
        with Turn(learner, self.shards, range(mesh.replica * share, (mesh.replica + 1) * share)) as turn:
            yield turn

    def _settings(self, layout: Layout) -> dict[str, Value]:
        config, devices = self._config, torch.cuda.device_count() if self._config.device == "cuda" else 0
        plan = self._arranged[layout].plans[0]
        return {
            "layout": layout.name,
            "copies": layout.copies,
            "data": layout.data,
            "pipeline": layout.pipeline,
            "schedule": layout.schedule,
            "num_microbatches": layout.num_microbatches,
            "ranks": layout.ranks,
            "threads": layout.threads,
            "stacked": layout.stacked,
            "oversubscribed": layout.oversubscribed(self._num_cores, devices, launched_local_world_size()),
            "network": self._job.network_name,
            "head": self._job.head,
            "environment": config.env,
            "batch_size": config.batch_size,
            "agent": config.agent,
            "num_shards": config.num_shards,
            "device": config.device,
            "backend": dist.get_backend(),
            "memory_format": self._profile.memory_format,
            "precision": str(self._accelerations[layout]),
            "boundaries": "-".join(map(str, plan.partition.boundaries)),
            "virtual": layout.virtual,
            "lookahead": config.lookahead,
            "recompute": "-".join(plan.recompute if len(set(plan.recompute)) > 1 else plan.recompute[:1]),
            "steps": config.steps,
            "target_period": self._job.workload.settings.target_period,
            "frames_per_transition": self._job.spec.frames_per_action,
        }


def _file_name(layout: Layout) -> str:
    return re.sub(r"[^\w.+-]+", "_", layout.name)
