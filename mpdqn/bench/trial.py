"""`run_trials`: the part of a comparison that runs on every rank, alike.

rank 0   collect ─ choose memory format ─ profile ─┐
all ranks                       shards, profile ───┴─ for each round: A B C A B C …
                                                      (build, warm up and check, time, take down)
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mpdqn.actors import collect
from mpdqn.allocator import keep_freed_memory
from mpdqn.arrangement import Arrangement, NothingFits
from mpdqn.bench.config import Job
from mpdqn.bench.costs import cost_table
from mpdqn.bench.measure import RankMeasurement, combine
from mpdqn.bench.trace import chrome_trace
from mpdqn.cores import memory_per_rank, peak_memory, pin, reset_peak_memory
from mpdqn.dqn.acting import ActionValues
from mpdqn.dqn.agents import make_agent
from mpdqn.dqn.batch import Batch
from mpdqn.environments import FRAMES_PER_ACTION
from mpdqn.layouts import Layout
from mpdqn.learner import Learner, LearnerConfig, LearnStep, gather_by_name
from mpdqn.mesh import Mesh, World, launched_local_world_size
from mpdqn.networks import MemoryFormat, choose_memory_format, set_memory_format
from mpdqn.partition import profile
from mpdqn.plan import Profile
from mpdqn.records import RECORDS, TABLES, TRACES, Record, Value, append_records, read_records, without_places
from mpdqn.replay import VirtualShards
from mpdqn.timeline import LATE, Timeline

PROFILE_REPEATS = 9

PROBE = LearnerConfig(max_grad_norm=float("inf"), learning_rate=1e-12)


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
    """The trials of one comparison, as one rank sees them."""

    def __init__(self, world: World, job: Job) -> None:
        self._world, self._job, self._config = world, job, job.config
        self._agent = make_agent(self._config.agent)
        # A step runs each layer forward once with a graph and once more for every no-gradient pass.
        self._forward_passes = 1 + len(self._agent.passes)
        self._first = world.rank == 0
        self._num_cores = len(job.cores)
        self._announced: dict[tuple[Layout, int], Batch] = {}

    def prepare(self) -> None:
        """Collect transitions, measure the layers and arrange every layout."""
        self._shards = self._collect()
        self._profile = self._measure_layers()
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
            (folder / "environment.json").write_text(json.dumps(without_places(about), indent=1, default=str) + "\n")
            (folder / "profile.json").write_text(self._profile.to_json() + "\n")
            (folder / TABLES).mkdir()
            for layout, arranged in self._arranged.items():
                (folder / TABLES / f"{_file_name(layout)}.csv").write_text(arranged.table.to_csv())
        reference = self._reference()
        errors: dict[Layout, dict[str, Value]] = {}
        turns = [(r, layout) for r in range(self._config.rounds) for layout in self._job.layouts]
        for r, layout in tqdm(turns, desc="trials", unit="trial", disable=not self._first, file=sys.stderr):
            if r == 0:
                errors[layout] = self._check(layout, reference)
            ranks = self._trial(layout)
            if self._first:
                values = combine(self._arranged[layout], ranks, self._config.batch_size)
                record = Record(
                    experiment="compare",
                    row=layout.name,
                    round=r,
                    seed=self._config.seed,
                    settings=self._settings(layout),
                    values={**values, **errors[layout]},
                    environment=self._job.environment,
                )
                append_records(folder / RECORDS, [record])
            if self._config.trace and r == self._config.rounds - 1:
                self._trace(layout, folder)

    def _collect(self) -> VirtualShards:
        """Real transitions in every shard: rank 0 plays, the others get whole shards."""
        config = self._config
        shards = VirtualShards(
            observation_shape=self._job.spec.observation_shape,
            num_shards=config.num_shards,
            capacity=config.transitions,
            envs_per_shard=config.envs_per_shard,
            seed=config.seed,
            stack=self._job.spec.observation_shape[0],
        )
        pin(list(self._job.cores), self._num_cores, 0)
        if self._first:
            network = self._job.make_network().to(self._world.device)
            stats = collect(
                ActionValues(network, self._agent),
                config.env,
                shards,
                num_transitions=config.transitions,
                epsilon=config.epsilon,
                seed=config.seed,
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
            frames = self._shards.sample(self._config.batch_size, 0).obs.to(self._world.device)
            part = frames[: max(1, len(frames) // self._config.num_microbatches)]
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

    def _reference(self) -> tuple[dict[str, Tensor], Tensor] | None:
        """Gradients and TD errors of the single process on the first batch, on rank 0."""
        layout = Layout(threads=self._num_cores)
        learner = self._build(layout, probe=True)
        if learner is None:
            return None
        td_errors, gradients = self._probe(learner, layout)
        assert td_errors is not None
        return gradients, td_errors.cpu()

    def _probe(self, learner: Learner, layout: Layout) -> tuple[Tensor | None, dict[str, Tensor]]:
        """TD errors and gradients of the second update, which has target values that ran ahead, if any do."""
        # TF32 rounds to 10 bits, differently for every shape: the layouts could not be told from wrong ones.
        with torch.backends.cudnn.flags(allow_tf32=False):
            td_errors = [self._learn(learner, layout, update).td_errors for update in (0, 1)][-1]
        gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
        return td_errors, gather_by_name(learner, gradients)

    def _check(self, layout: Layout, reference: tuple[dict[str, Tensor], Tensor] | None) -> dict[str, Value]:
        """On rank 0: how far gradients and TD errors are from those of the single process on the same batches."""
        learner = self._build(layout, probe=True)
        td_errors: Tensor | None = None
        gradients: dict[str, Tensor] = {}
        if learner is not None:
            td_errors, gradients = self._probe(learner, layout)
        parts = self._world.to_first(None if td_errors is None else td_errors.cpu())
        if reference is None:
            return {}
        first_copy = [part for part in parts[: layout.ranks // layout.copies] if part is not None]
        return {
            "gradient_error": _relative_error(gradients, reference[0]),
            "td_error_error": _relative_error({"": torch.cat(first_copy)}, {"": reference[1]}),
        }

    def _trial(self, layout: Layout) -> list[RankMeasurement]:
        """One turn of ``layout``: build, warm up, time, take down. On rank 0 what every rank measured."""
        reset_peak_memory(self._world.device)
        learner = self._build(layout)
        late_s = 0.0
        if learner is not None:
            self._learn(learner, layout, 0)  # nothing was announced before it: its target passes run late
            late_s = learner.timeline().busy(self._world.rank, LATE)
        self._world.barrier()
        measured = replace(self._time(learner, layout), late_pass_s=late_s) if learner is not None else None
        return [rank for rank in self._world.to_first(measured) if rank is not None]

    def _time(self, learner: Learner, layout: Layout) -> RankMeasurement:
        timelines, sent = [], 0
        _synchronize(self._world.device)
        begin = time.perf_counter()
        for i in range(self._config.steps):
            sent += self._learn(learner, layout, 1 + i).bytes_sent
            timelines.append(learner.timeline())
        _synchronize(self._world.device)
        seconds = time.perf_counter() - begin
        return RankMeasurement.of(self._world.rank, timelines, seconds, sent, peak_memory(self._world.device))

    def _trace(self, layout: Layout, folder: Path) -> None:
        """Two more updates of ``layout``, on rank 0 written with what the simulator expected of them."""
        learner = self._build(layout)
        measured: list[Timeline] = []
        if learner is not None:
            for update in range(3):
                _synchronize(self._world.device)  # the clocks of host and device meet where the device is idle
                self._learn(learner, layout, update)
                measured.append(learner.timeline().moved(learner.stopwatch.origin, update))
        parts = [timeline for rank in self._world.to_first(measured) for timeline in rank[1:]]
        if self._first:
            whole = Timeline.joined(parts)
            update_s = whole.busy(0, "optimizer") / 2
            (folder / TRACES).mkdir(exist_ok=True)
            simulated = self._arranged[layout].simulated(2, update_s)
            (folder / TRACES / f"{_file_name(layout)}.json").write_text(
                chrome_trace({"measured": whole, "simulated": simulated})
            )

    def _learn(self, learner: Learner, layout: Layout, update: int) -> LearnStep:
        """One update on this replica's part of batch ``update``; its TD errors go back to the shards."""
        if not learner.owns_shards:
            return learner.learn(None)
        share = self._config.num_shards // layout.data
        owned = range(learner.mesh.replica * share, (learner.mesh.replica + 1) * share)
        batch = self._announced.pop((layout, update), None)
        if batch is None:
            batch = self._shards.sample(self._config.batch_size, update, owned)
        upcoming = None
        if self._config.lookahead:
            upcoming = self._shards.sample(self._config.batch_size, update + 1, owned)
            self._announced = {(layout, update + 1): upcoming}
        step = learner.learn(batch, upcoming)
        assert step.td_errors is not None
        self._shards.return_td_errors(batch.index, step.td_errors.cpu(), owned)
        return step

    def _build(self, layout: Layout, *, probe: bool = False) -> Learner | None:
        """This rank's learner in ``layout``, pinned to its share of the cores; None without a part.

        A ``probe`` is made to show differences: its target network has other weights than the online one, so that the
        passes cannot stand in for one another; its gradients are not clipped, so that their scale shows; and its
        weights hardly move, so that a second update shows rounding as the first does.
        """
        # The reference need not be a row, and no limit is meant for it then.
        arranged = self._arranged.get(layout) or self._arrange(layout, math.inf)
        self._announced = {}
        meshes = [Mesh(self._world, plan, self._agent.letters) for plan in arranged.plans]
        mesh = next((mesh for mesh in meshes if mesh.member), None)
        if mesh is None:
            return None
        pin(list(self._job.cores), layout.threads, self._world.rank)
        network = self._job.make_network()
        set_memory_format(network, cast(MemoryFormat, self._profile.memory_format))
        learner = Learner(
            network,
            mesh=mesh,
            agent=self._agent,
            batch_size=self._config.batch_size,
            observation_shape=self._job.spec.observation_shape,
            config=replace(
                PROBE if probe else LearnerConfig(), lookahead=self._config.lookahead, seed=self._config.seed
            ),
            table=arranged.table,
        )
        if probe:
            weights = self._job.make_network(stream=1).state_dict()
            for stage in learner.stages:
                stage.target.load_state_dict({name: weights[name] for name in stage.target.state_dict()})
        return learner

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
            "tf32": config.device == "cuda" and torch.backends.cudnn.allow_tf32,
            "boundaries": "-".join(map(str, plan.partition.boundaries)),
            "virtual": layout.virtual,
            "lookahead": config.lookahead,
            "recompute": "-".join(plan.recompute if len(set(plan.recompute)) > 1 else plan.recompute[:1]),
            "steps": config.steps,
            "frames_per_transition": FRAMES_PER_ACTION,
        }


def _relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖₂ / ‖b‖₂ over all tensors together, in float64."""
    if a.keys() != b.keys():
        return float("inf")
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return float((difference / sum(float(t.double().square().sum()) for t in b.values())) ** 0.5)


def _file_name(layout: Layout) -> str:
    return re.sub(r"[^\w.+-]+", "_", layout.name)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
