"""What becomes of checkpoints and their frames when a disk is nearly full, or something fails beside the writing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mpdqn.checkpoint.entries import FileEntry, RowsEntry, ShardRows
from mpdqn.checkpoint.files import check_file
from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.loader import Choice, _place, choose, load_frames
from mpdqn.checkpoint.manifest import Manifest
from mpdqn.checkpoint.saver import NotSaved, Saved, Saver
from mpdqn.mesh import World
from tests.checkpoint.test_saver import fill, make_shards, saved


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes; the kernel sees to it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def chosen(world: World, folder: CheckpointFolder) -> Choice:
    choice = choose(world, folder, (0, 1), lambda found, path: None)
    assert choice is not None
    return choice


def held(folder: CheckpointFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


def test_frames_are_read_in_the_run_or_where_a_replay_dir_was(tmp_path: Path) -> None:
    """A manifest could name a folder of any place: ``…/rows/shard-0`` was read wherever that was."""
    folder, empty = CheckpointFolder(tmp_path / "run"), FileEntry(bytes=0, sha256="")
    files = (RowsEntry(file="1.rows", first=(0,), stop=(0,), entry=empty),)
    own = folder.root / "rows" / "shard-0"
    for recorded, place in {
        tmp_path / "other" / "rows" / "shard-0": own,
        tmp_path / "moved" / "checkpoints" / "rows" / "shard-0": own,
        tmp_path / "scratch" / "rows-of-run" / "shard-0": None,
    }.items():
        recorded.mkdir(parents=True)
        (recorded / "1.rows").touch()
        assert _place(folder, 0, ShardRows(host="here", folder=str(recorded), files=files)) == (place or recorded)


def test_wherever_the_disk_is_full_nothing_is_left(alone: World, tmp_path: Path) -> None:
    """In frames, in tensors, in the manifest: the old checkpoint stays as it was, and later ones lack nothing."""
    folder, shards = CheckpointFolder(tmp_path), make_shards(300)
    saver = Saver(alone, folder, keep=2, shards=shards)
    few = {"x": torch.arange(100.0)}
    rounds, row_bytes = 1, 5 * 1_600
    fill(shards, 5)
    assert isinstance(saved(saver, few, rounds), Saved)
    tensors = {"x": torch.arange(5_000.0)}
    names = {f"number {k}": torch.zeros(()) for k in range(300)}  # the manifest is larger than all that they hold
    for limit, state in ((0, few), (row_bytes - 1, few), (row_bytes, tensors), (row_bytes, names)):
        fill(shards, 5)
        before = held(folder)
        with files_of_at_most(limit):
            outcome = saved(saver, state, rounds + 1)
        assert isinstance(outcome, NotSaved), limit
        assert "[Errno 27] File too large (rank 0)" in str(outcome)
        assert held(folder) == before
        assert not folder.draft(rounds + 1).exists()
        assert chosen(alone, folder).manifest.round == rounds
        rounds += 1
        assert isinstance(saved(saver, few, rounds), Saved), "with the frames that were not written"
        choice, other = chosen(alone, folder), make_shards(300)
        assert (choice.manifest.round, choice.damaged) == (rounds, ())
        for v in (0, 1):
            other[v].load_tensors(shards[v].tensors(frames=False))
        load_frames(choice, other)
        assert all((other[v].frames == shards[v].frames).all() for v in (0, 1))


class FailingFolder(CheckpointFolder):
    """On a disk that fails when old checkpoints are to be deleted."""

    def rotate(self, keep: int) -> list[Manifest]:
        raise OSError(5, "Input/output error")


def test_what_fails_after_the_rename_costs_no_frames(alone: World, tmp_path: Path) -> None:
    """From then on it is a checkpoint."""
    folder, shards = FailingFolder(tmp_path), make_shards()
    fill(shards, 5)
    outcome = saved(Saver(alone, folder, keep=2, shards=shards), {"x": torch.ones(1)}, 2)
    assert isinstance(outcome, NotSaved), "what failed is told"
    assert "Input/output error" in str(outcome)
    choice = chosen(alone, folder)
    assert (choice.manifest.round, choice.damaged) == (2, ())
    for v, place in choice.rows.items():
        for one in choice.manifest.rows[v].files:
            check_file(place / one.file, one.entry)


def test_a_folder_of_somebody_else_among_the_frames_is_left_alone(alone: World, tmp_path: Path) -> None:
    folder, shards = CheckpointFolder(tmp_path), make_shards()
    saver = Saver(alone, folder, keep=1, shards=shards)
    fill(shards, 5)
    assert isinstance(saved(saver, {"x": torch.ones(1)}, 1), Saved)
    (folder.shard_folder(0) / "notes").mkdir()
    assert isinstance(saved(saver, {"x": torch.ones(1)}, 2), Saved)
    assert (folder.shard_folder(0) / "notes").is_dir()
    assert chosen(alone, folder).manifest.round == 2


def test_a_whole_draft_is_no_checkpoint_and_gives_way(alone: World, tmp_path: Path) -> None:
    """A run was killed just before the rename; what goes on writes the same round again."""
    folder, shards = CheckpointFolder(tmp_path), make_shards()
    saver = Saver(alone, folder, keep=2, shards=shards)
    for rounds in (1, 2):
        fill(shards, 5)
        assert isinstance(saved(saver, {"x": torch.full((9,), rounds)}, rounds), Saved)
    folder.folder(2).rename(folder.draft(2))
    choice = chosen(alone, folder)
    assert (choice.manifest.round, choice.damaged) == (1, ())
    again = Saver(alone, folder, keep=2, shards=shards, rows={v: choice.manifest.rows[v].files for v in (0, 1)})
    assert isinstance(saved(again, {"x": torch.full((3,), 2)}, 2), Saved)
    choice = chosen(alone, folder)
    assert (choice.manifest.round, choice.damaged, choice.manifest.tensors["x"].shape) == (2, (), (3,))
    assert not folder.draft(2).exists()
