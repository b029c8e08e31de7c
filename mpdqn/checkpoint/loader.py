"""Which checkpoint to go on from, and its tensors, by parameter name and virtual shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from mpdqn.checkpoint.entries import RowsEntry, ShardRows
from mpdqn.checkpoint.files import check_file
from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.manifest import DamagedCheckpoint, Manifest, WrongCheckpoint
from mpdqn.checkpoint.rows import check_rows, load_rows
from mpdqn.checkpoint.storage import RawReader
from mpdqn.mesh import World
from mpdqn.replay import VirtualShards

ADVICE = "to resume from the checkpoint before it, rename that folder"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The checkpoint to go on from, the same on every rank.

    ``damaged`` tells what is wrong with newer ones; ``gone`` are the shards whose frames lay where no rank finds them
    any more, with where that was. ``rows`` is where this rank's shards have theirs.
    """

    manifest: Manifest
    folder: Path
    damaged: tuple[str, ...]
    gone: Mapping[int, str]
    rows: Mapping[int, Path]


def choose(
    world: World, folder: CheckpointFolder, owned: Sequence[int], accept: Callable[[Manifest, Path], None]
) -> Choice | None:
    """The newest checkpoint of ``folder`` that is whole; None if there is none at all. Collective over the world.

    Every file is read and its digest taken, each rank's frames by that rank.

    Args:
        world: all ranks.
        folder: the run's checkpoints, and where this rank would have the frames of its shards.
        owned: the shards that this rank is to have.
        accept: raises WrongCheckpoint for a manifest that is not of this run.

    Raises:
        WrongCheckpoint: on every rank, for the newest one that is whole but of another version, run or network.
        DamagedCheckpoint: on every rank, if none is whole, with what is wrong with each.
    """
    damaged: list[str] = []
    for path in world.from_first(folder.found()):
        manifest: Manifest | None = None
        wrong: str | None = None
        problems: list[str] = []
        gone: dict[int, str] = {}
        places: dict[int, Path] = {}
        try:
            manifest = Manifest.read(path)
            accept(manifest, path)
            names = sorted(manifest.files)
            for name in names[world.rank :: world.size]:
                check_file(path / name, manifest.files[name])
            for v in owned:
                place = _place(folder, v, manifest.rows[v])
                if place is None:
                    gone[v] = f"{manifest.rows[v].folder} on {manifest.rows[v].host}"
                else:
                    check_rows(place, manifest.rows[v].files)
                    places[v] = place
        except WrongCheckpoint as error:
            wrong = str(error)
        except DamagedCheckpoint as error:
            problems.append(str(error))
        except KeyError as error:
            problems.append(f"{path} has no shard {error}")
        told = _from_all(world, (wrong, problems, gone))
        if wrongs := [text for text, _, _ in told if text is not None]:
            raise WrongCheckpoint(wrongs[0])
        if found := [text for _, texts, _ in told for text in texts]:
            damaged.append(found[0])
            continue
        assert manifest is not None
        everywhere = {v: text for _, _, part in told for v, text in part.items()}
        return Choice(manifest=manifest, folder=path, damaged=tuple(damaged), gone=everywhere, rows=places)
    if damaged:
        raise DamagedCheckpoint(
            f"none of the {len(damaged)} checkpoints in {folder.root} is whole: {'; '.join(damaged)}; delete that "
            "folder to begin the run anew"
        )
    return None


def load_tensors(world: World, choice: Choice, targets: dict[str, Tensor]) -> None:
    """Fill each of ``targets`` with the tensor of its name; they may differ from rank to rank. Collective.

    Raises:
        WrongCheckpoint: if a name is missing, or of another shape or dtype.
        DamagedCheckpoint: if a file cannot be read any more.
    """
    with on_every_rank(world, choice):
        _check_targets(choice, targets)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    group = world.group(range(world.size), "gloo", "checkpoints")
    reader = RawReader(choice.folder, choice.manifest)
    try:
        load(dict(targets), storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:  # no Exception of Python's; a file went or shrank since it was checked
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise DamagedCheckpoint(f"{choice.folder} could not be read: {cause} (rank {rank})") from error


def _check_targets(choice: Choice, targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        entry = choice.manifest.tensors.get(name)
        have = str(target.dtype).removeprefix("torch."), tuple(target.shape)
        if entry is None or (entry.dtype, entry.shape) != have:
            there = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise WrongCheckpoint(
                f"{choice.folder} holds {there} as {name} and {have[0]} {list(have[1])} is needed; resume with the "
                "settings of the run"
            )


@contextmanager
def on_every_rank(world: World, choice: Choice) -> Iterator[None]:
    """Raise what one rank finds wrong with the checkpoint on every rank, so that no rank waits for it in vain.

    Collective over the world: every rank enters and leaves, and calls nothing collective in between.

    Raises:
        WrongCheckpoint: if the lowest rank with an error had this one.
        DamagedCheckpoint: for any other error that what was read can cause.
    """
    error: Exception | None = None
    try:
        yield
    except torch.OutOfMemoryError:  # says nothing about the checkpoint
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError) as caught:
        error = caught
    told = _from_all(world, _described(error, choice))
    for wrong, text in (one for one in told if one is not None):
        raise (WrongCheckpoint if wrong else DamagedCheckpoint)(text) from error


def _described(error: Exception | None, choice: Choice) -> tuple[bool, str] | None:
    """Return whether an error means a wrong checkpoint (else a damaged one), and its text in one line."""
    if error is None:
        return None
    if isinstance(error, (WrongCheckpoint, DamagedCheckpoint)):
        return isinstance(error, WrongCheckpoint), str(error)
    text = " ".join(str(error if isinstance(error, ValueError) else repr(error)).split())
    return False, f"{choice.folder} cannot be restored: {text}; {ADVICE}"


def empty(choice: Choice, names: Sequence[str]) -> dict[str, Tensor]:
    """New tensors on the CPU for `load_tensors`, with the shapes and dtypes that the checkpoint has for ``names``."""
    entries = choice.manifest.tensors
    return {n: torch.empty(entries[n].shape, dtype=getattr(torch, entries[n].dtype)) for n in names}


def load_frames(choice: Choice, shards: VirtualShards) -> None:
    """Load the frames of all owned shards that are not gone; their cursors must be loaded already."""
    for v, place in choice.rows.items():
        load_rows(place, choice.manifest.rows[v].files, shards[v])


def usable_rows(choice: Choice, folder: CheckpointFolder) -> dict[int, tuple[RowsEntry, ...]]:
    """The files of this rank's frames that further checkpoints share: those that lie in ``folder`` themselves."""
    return {
        v: choice.manifest.rows[v].files
        for v, place in choice.rows.items()
        if place.resolve() == folder.shard_folder(v).resolve()
    }


def _place(folder: CheckpointFolder, number: int, rows: ShardRows) -> Path | None:
    """Where the frames of a shard are; None if nowhere that this rank can see, and not by damage.

    That is in the run's folder, or in a folder of frames of some ``--replay-dir``, which only the manifest may know.
    """
    recorded, here = Path(rows.folder), folder.shard_folder(number)
    if recorded.parent.name == "rows":
        return folder.root / "rows" / here.name  # in the run's folder, wherever that is now: they belong to it
    for holds in (all, any):  # a folder that has them all goes before one that has some, of another time perhaps
        for place in (here, recorded):
            if holds((place / one.file).exists() for one in rows.files):
                return place
    return None


def _from_all(world: World, value: T) -> list[T]:
    """The values of all ranks, by rank. Collective over the world."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    with world.waiting("waiting for all ranks to look at a checkpoint"):
        dist.all_gather_object(values, value, group=world.lobby)
    return values
