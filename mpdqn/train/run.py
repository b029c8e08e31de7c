"""`train`: a training run from its configuration to its folder.

check ─▶ launch ─▶ on every rank: Trainer.run ─▶ progress, evaluations ─▶ weights.pt, policy.pt2, records.jsonl
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpdqn.allocator import keep_freed_memory
from mpdqn.launch import launch
from mpdqn.launched import launched
from mpdqn.mesh import World
from mpdqn.train.check import check
from mpdqn.train.checkpoints import choose_checkpoint
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.folder import new_folder
from mpdqn.train.lock import FolderInUse, FolderLock, ReplayLock, RunLock, check_replay_unused
from mpdqn.train.mapped import check_owner, clear, mark
from mpdqn.train.rank import owned_shards
from mpdqn.train.resume import recorded_config, run_id, with_trusted_code
from mpdqn.train.session import Session, TrainResult
from mpdqn.train.stop import StopSignal


def train(config: TrainConfig | None = None, **settings: Any) -> TrainResult:
    """Train as ``mpdqn train`` does.

    Started by torchrun, every process calls this alike; rank 0 has the result, the others an empty one. With ``resume``
    the run in that folder goes on with its own settings; only those given here are other ones. Code that the folder
    names (``network="my_file.py:make_network"``, ``env="module:Id"``) runs only if it is given here again, or with
    ``trust=True``. Replay that is mapped in a directory which only the folder names is deleted only if it is marked as
    that run's, or ``replay_dir`` is given here again, beside ``config`` (`mpdqn.train.mapped`).

    Args:
        config: what to train; DQN on Pong by default.
        settings: other fields of `TrainConfig`.

    Raises:
        ValueError: for bad input, before any work.
        mpdqn.train.resume.UntrustedCode: for code that only the folder names, before any of it runs.
        mpdqn.train.loop.NotANumber: at a loss that is no number.
        mpdqn.launch.WorkerError: if a worker fails, with its own error first.
    """
    if config is None and settings.get("resume") is not None:
        config = recorded_config(settings["resume"])
    config = replace(config or TrainConfig(), **settings)
    if config.trust and config.resume is None:
        warnings.warn(
            "--trust has no effect without --resume; it trusts the code that a run's folder names", stacklevel=2
        )
    elif config.trust:
        config = with_trusted_code(config)
    directory = config.resolved().replay_dir
    if directory is not None and not launched():  # launched ranks see to it together: one may have its locks already
        check_replay_unused(directory)
    job = replace(check(config), replay_dir_named="replay_dir" in settings)
    if config.resume is not None and not launched():
        check_owner(job, range(job.config.num_shards), run_id(config.resume))
    if launched() or job.num_ranks == 1:
        return train_rank(job)
    results: list[TrainResult] = launch(
        train_rank, job, num_workers=job.num_ranks, forward_sigterm=True, timeout_s=job.config.timeout
    )
    return results[0]


def train_rank(job: TrainJob) -> TrainResult:
    """This rank's part in a run. Collective over the ranks of the job."""
    keep_freed_memory()
    with World.open(job.config.device, job.config.timeout) as world:
        return train_in(world, job)


def train_in(world: World, job: TrainJob) -> TrainResult:
    """This rank's part in a run of a world that is open already, and stays so. Collective over its ranks.

    Raises:
        ValueError: also if another process trains in the folder of a run to go on with, no checkpoint of it is whole,
            or replay in its ``--replay-dir`` is not its own; on every rank alike.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        lock_replay(world, stack, job)  # before anything is made or deleted
        folder = world.from_first((job.config.resume or new_folder(job)) if world.rank == 0 else Path())
        lock(world, stack, folder)
        choice, run = None, uuid.uuid4().hex
        if job.config.resume is not None:
            run = run_id(folder)
            check_mapped(world, job, run)
            choice = choose_checkpoint(world, job, folder, run)
            clear_replay(world, job, run)
        run = world.from_first(run)
        mark_replay(world, job, run)
        session = Session(world, job, folder, run, stop)
        result = session.run(choice)
        world.barrier()
    return result


def lock(world: World, stack: ExitStack, folder: Path) -> None:
    """Hold the folder's lock on rank 0; FolderInUse on every rank if another run has it. Collective."""
    _hold(world, stack, [RunLock(folder)] if world.rank == 0 else [])


def lock_replay(world: World, stack: ExitStack, job: TrainJob) -> None:
    """Hold the locks of this rank's shards in ``--replay-dir``; FolderInUse on every rank if a live run has one.

    Collective over the world.
    """
    directory = job.config.replay_dir
    _hold(world, stack, [] if directory is None else [ReplayLock(directory, v) for v in _mapped_shards(world, job)])


def check_mapped(world: World, job: TrainJob, run: str) -> None:
    """Raise ValueError, on every rank, if one's shards in ``--replay-dir`` are not those of ``run``. Collective."""
    _on_every_rank(world, lambda: check_owner(job, _mapped_shards(world, job), run))


def clear_replay(world: World, job: TrainJob, run: str) -> None:
    """Delete what ``run``, which is gone on with, had mapped to disk; its checkpoints hold the frames. Collective.

    The shards are locked, so no live run has anything there.
    """
    _on_every_rank(world, lambda: clear(job, _mapped_shards(world, job), run))


def mark_replay(world: World, job: TrainJob, run: str) -> None:
    """Mark this rank's shards in ``--replay-dir`` as those of ``run``, before they have frames. Collective."""
    _on_every_rank(world, lambda: mark(job, _mapped_shards(world, job), run))


def _mapped_shards(world: World, job: TrainJob) -> range:
    """The shards that this rank maps to disk: an acting rank plays for some, and has none."""
    return owned_shards(job, world.rank) if world.rank < job.layout.ranks else range(0)


def _hold(world: World, stack: ExitStack, locks: Sequence[FolderLock]) -> None:
    """Hold this rank's ``locks`` until ``stack`` ends; FolderInUse on every rank if one cannot be had. Collective."""

    def take() -> None:
        for each in locks:
            stack.enter_context(each)

    _on_every_rank(world, take, FolderInUse)  # for a link in a lock's place, too


def _on_every_rank(world: World, act: Callable[[], None], kind: type[ValueError] = ValueError) -> None:
    """Call ``act``; what it refuses on one rank raises ``kind`` on every rank. Collective."""
    refused = ""
    try:
        act()
    except (ValueError, OSError) as error:
        refused = str(error)
    told = world.to_first(refused)
    if refused := world.from_first(next((text for text in told if text), "")):
        raise kind(refused)
