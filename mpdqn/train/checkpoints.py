"""`Checkpoints`: when a run writes checkpoints, what they hold, and how it goes on from one.

after a round, on every rank     due by frames, by the clock (rank 0's), or asked for by SIGTERM ─▶ Saver
before the first one             the newest that is whole ─▶ Trainer ─▶ progress, logs
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.learner import check_network, shapes
from mpdqn.checkpoint.loader import Choice, choose, empty, load_tensors, on_every_rank, usable_rows
from mpdqn.checkpoint.manifest import DamagedCheckpoint, Manifest, WrongCheckpoint
from mpdqn.checkpoint.saver import NotSaved, Saved, Saver
from mpdqn.mesh import World
from mpdqn.train.acting import Acting
from mpdqn.train.config import TrainJob
from mpdqn.train.loop import Trainer
from mpdqn.train.rank import owned_shards
from mpdqn.train.state import refill, restore, trainer_state, waiting_deliveries
from mpdqn.train.stop import StopSignal

BESIDES: Mapping[str, tuple[int, ...]] = {"run.losses": (), "run.norms": (), "run.episodes": (4,), "run.pending": (4,)}
"""Tensors float64 [k, …] that rank 0 saves besides the trainer's: of the row under way, and episodes."""

NOTHING, CHECKPOINT, STOP = 0, 1, 2
"""What a rank can be asked for, in the order of precedence."""


def checkpoint_folder(job: TrainJob, folder: Path) -> CheckpointFolder:
    """Where the checkpoints of the run in ``folder`` are."""
    return CheckpointFolder(folder, job.config.replay_dir)


def choose_checkpoint(world: World, job: TrainJob, folder: Path, run: str) -> Choice | None:
    """The checkpoint that the run ``run`` in ``folder`` goes on from; None if it had not come to one. Collective.

    Raises:
        DamagedCheckpoint: if there are some and none is whole.
        WrongCheckpoint: if the newest whole one is not of this run, network or version.
    """
    network = shapes(job.make_network().state_dict())

    def accept(manifest: Manifest, path: Path) -> None:
        if manifest.run != run:
            raise WrongCheckpoint(
                f"{path} is of run {manifest.run[:8]} but {folder} holds run {run[:8]}; put back that run's checkpoints"
            )
        check_counts(manifest, job, path)
        check_network(manifest.parameters, network, str(path))
        if manifest.round > job.num_rounds:
            raise WrongCheckpoint(
                f"{path} is {manifest.frames} frames old but --frames {job.config.frames} are to be played; raise it"
            )

    own = checkpoint_folder(job, folder)
    stored = owned_shards(job, world.rank) if world.rank < job.layout.ranks else range(0)
    choice = choose(world, own, stored, accept)
    if choice is not None and world.rank == 0:
        for text in choice.damaged:
            warnings.warn(f"{text}; the run goes on from {choice.folder}", stacklevel=2)
    if world.rank == 0:
        own.remove_drafts()
        for path in own.found():
            if choice is not None and path.name > choice.folder.name:
                own.set_aside(path)
    world.barrier()
    return choice


def check_counts(manifest: Manifest, job: TrainJob, path: Path) -> None:
    """Raise DamagedCheckpoint unless the numbers of ``manifest`` are ones that ``job`` can have written.

    Frames and updates follow from the round, and the counters are of their types and within what the round allows:
    the loops and means of the rounds to come rely on that.
    """
    rounds, counters = manifest.round, manifest.counters
    frames, updates = job.frames_after(rounds), job.updates_after(rounds)
    if (manifest.frames, manifest.updates) != (frames, updates):
        raise DamagedCheckpoint(
            f"{path} is damaged: it has {manifest.frames} frames and {manifest.updates} updates, but {rounds} rounds "
            f"are {frames} and {updates}"
        )
    largest = {
        # With a lag a chunk is played ahead, once more after each resume that lost replay; a resume plays a round.
        "steps_played": (2 * rounds + 1) * job.config.round_steps,
        "waiting_deliveries": max(0, job.config.actor_lag - 1),  # see LaggedWeights.deliver
        "resumed": rounds,
        "row_late_passes": 2**63 - 1,
    }
    fits = {name: _is_count(counters.get(name), most) for name, most in largest.items()}
    for name in ("seconds", "row_seconds"):
        fits[name] = type(counters.get(name)) in (int, float) and 0 <= counters[name] < 2**63
    lost, before = counters.get("replay_lost"), counters.get("row_before")
    fits["replay_lost"] = isinstance(lost, list) and all(_is_count(v, job.config.num_shards - 1) for v in lost)
    at_most = (frames, rounds * job.transitions_per_round, updates)  # of the row before, as `Progress` counts
    fits["row_before"] = (
        isinstance(before, list)
        and len(before) == 3
        and all(_is_count(value, most) for value, most in zip(before, at_most, strict=True))
    )
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise DamagedCheckpoint(f"{path} is damaged: its counter {wrong[0]} is {str(counters.get(wrong[0]))[:60]!r}")


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


class Checkpoints:
    """One rank's part in the checkpoints of a run. Building one is collective over the world.

    Args:
        trainer: before its first round.
        folder: the run's.
        run: what the run is called in its checkpoints.
        choice: the checkpoint to go on from; None begins anew.
    """

    def __init__(self, trainer: Trainer, folder: Path, run: str, choice: Choice | None) -> None:
        self._trainer, self._job, self._run = trainer, trainer.job, run
        self._folder = checkpoint_folder(trainer.job, folder)
        rows = {} if choice is None else usable_rows(choice, self._folder)
        self._saver = Saver(
            trainer.world, self._folder, keep=trainer.job.config.keep_checkpoints, shards=trainer.shards, rows=rows
        )
        if trainer.shards is not None:
            self._folder.remove_unused_rows(
                trainer.shards.owned, {v: [r.file for r in files] for v, files in rows.items()}
            )
        trainer.before_storing = self._saver.make_way
        self._network = shapes(trainer.job.make_network().state_dict())
        self._last = time.monotonic()
        self.last: Saved | None = None
        self.problem = ""

    def due_by_the_clock(self) -> bool:
        """Whether so many minutes have passed since the last checkpoint, and none is being written."""
        minutes = self._job.config.checkpoint_minutes
        return bool(minutes) and not self._saver.busy and time.monotonic() - self._last >= 60 * minutes

    def start(self, rounds: int, state: dict[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint after so many rounds. Collective over the world.

        Args:
            rounds: how many are done.
            state: this rank's tensors besides the trainer's.
            counters: small numbers, on rank 0.
        """
        self._last = time.monotonic()
        job, trainer = self._job, self._trainer
        acting = trainer.acting if isinstance(trainer.acting, Acting) else None
        if acting is not None:
            acting.settle()
        told = trainer.world.to_first(
            None if acting is None else (acting.actors.steps_played, waiting_deliveries(trainer))
        )
        steps, waiting = next((each for each in told if each is not None), (0, 0))
        manifest = Manifest(
            run=self._run,
            round=rounds,
            frames=job.frames_after(rounds),
            updates=job.updates_after(rounds),
            layout=job.layout.name,
            plan=json.loads(trainer.arrangement.plans[0].to_json()),
            parameters=self._network,
            files={},
            tensors={},
            rows={},
            counters={**counters, "seed": job.config.seed, "steps_played": steps, "waiting_deliveries": waiting},
            written=time.time(),
            version=metadata.version("mpdqn"),
        )
        self._saver.start(trainer_state(trainer) | state, manifest)

    def look(self) -> bool:
        """Whether a checkpoint has ended since the last look, well or badly."""
        outcome = self._saver.result()
        if isinstance(outcome, Saved):
            self.last, self.problem = outcome, ""
        elif isinstance(outcome, NotSaved):
            self.problem = str(outcome)
            if self._trainer.world.rank == 0:
                warnings.warn(f"{outcome}; training goes on, and the checkpoints before it are whole", stacklevel=2)
        return outcome is not None

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._saver.wait()
        self.look()

    def remove(self) -> None:
        """Delete all checkpoints of a run that has come to its end. Collective over the world."""
        if self._trainer.shards is not None and self._folder.rows_are_elsewhere:
            self._folder.remove_rows(self._trainer.shards.owned)
        if self._trainer.world.rank == 0:
            self._folder.remove()


def go_on(trainer: Trainer, choice: Choice) -> dict[str, Tensor]:
    """Bring ``trainer`` to where ``choice`` was; what rank 0 had saved besides, there. Collective over the world.

    Warns:
        UserWarning: if shards of replay are gone.
    """
    restore(trainer, choice)
    if choice.gone:
        played = refill(trainer, choice)
        if trainer.world.rank == 0:
            shards, places = sorted(choice.gone), sorted(set(choice.gone.values()))
            warnings.warn(
                f"the replay of shards {shards} is gone: it was in {', '.join(places)}. They began empty, and {played} "
                "steps of each environment on their ranks were played with the weights of now to fill them; from here "
                "on this is not the run that was never stopped",
                stacklevel=2,
            )
    besides: dict[str, Tensor] = {}
    with on_every_rank(trainer.world, choice):
        check_besides(choice)
        besides |= empty(choice, list(BESIDES) if trainer.world.rank == 0 else [])
    load_tensors(trainer.world, choice, besides)
    return besides


def check_besides(choice: Choice) -> None:
    """Raise ValueError unless the tensors that rank 0 saves besides are there, in float64 and their shapes."""
    for name, columns in BESIDES.items():
        entry = choice.manifest.tensors.get(name)
        if entry is None or entry.dtype != "float64" or len(entry.shape) < 1 or entry.shape[1:] != columns:
            there = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            wanted = ", ".join(["k", *map(str, columns)])
            raise ValueError(f"{name} is {there}, not float64 [{wanted}]")


def asked_for(checkpoints: Checkpoints | None, stop: StopSignal, rank: int) -> int:
    """What this rank is asked for now."""
    if stop.received:
        return STOP
    if rank == 0 and checkpoints is not None and checkpoints.due_by_the_clock():
        return CHECKPOINT
    return NOTHING
