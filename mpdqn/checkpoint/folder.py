"""`CheckpointFolder`: where a run's checkpoints lie.

results/train/<run>/checkpoints/
  000000001200/       one checkpoint: manifest.json and a file of tensors from each rank
  000000001800/
  000000002400.draft/ one that is being written, or was when the run was killed: never taken
<rows>/               by default results/train/<run>/checkpoints/rows; with --replay-dir DIR, DIR/rows-of-<run>
  shard-0/            frames, each in one file only, which several checkpoints share
    000000001200.rows
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from mpdqn.checkpoint.manifest import DamagedCheckpoint, Manifest, WrongCheckpoint, folder_name
from mpdqn.files import check_own_folder

CHECKPOINTS = "checkpoints"
DRAFT = ".draft"
DAMAGED = ".damaged"


class CheckpointFolder:
    """The checkpoints of the run in ``run_folder``, and this host's frames of them, in ``rows`` or beside them."""

    def __init__(self, run_folder: Path, rows: Path | None = None) -> None:
        self.root = run_folder / CHECKPOINTS
        self.rows = self.root / "rows" if rows is None else rows / f"rows-of-{run_folder.name}"

    @property
    def rows_are_elsewhere(self) -> bool:
        """Whether frames lie outside the run's folder, perhaps on a disk that other hosts do not see."""
        return self.rows.parent != self.root

    def folder(self, rounds: int) -> Path:
        """Of the checkpoint after so many rounds."""
        return self.root / folder_name(rounds)

    def draft(self, rounds: int) -> Path:
        """Where it is written."""
        return self.root / (folder_name(rounds) + DRAFT)

    def shard_folder(self, number: int) -> Path:
        """Where the frames of shard ``number`` are, if this host has them."""
        return self.rows / f"shard-{number}"

    def make_shard_folder(self, number: int) -> Path:
        """Make the folder of the frames of shard ``number``; ValueError if a link is in its place."""
        folder = self.shard_folder(number)
        self.check_links()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check_links(self) -> None:
        """Raise ValueError if a folder in which checkpoints are written or deleted is a symbolic link."""
        check_own_folder(self.root)
        for path in (self.rows, *self.rows.glob("shard-*")):
            check_own_folder(path)

    def found(self) -> list[Path]:
        """The folders of all checkpoints, newest first, whole or not."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if path.name.isdigit()), reverse=True)

    def manifests(self) -> list[Manifest]:
        """Of all checkpoints whose manifest can be read, newest first."""
        manifests = []
        for folder in self.found():
            with contextlib.suppress(DamagedCheckpoint, WrongCheckpoint):
                manifests.append(Manifest.read(folder))
        return manifests

    def remove_drafts(self) -> None:
        """Delete what was being written when a run was killed."""
        for path in self.root.glob(f"*{DRAFT}"):
            _remove(path)

    def set_aside(self, folder: Path) -> None:
        """Keep a damaged checkpoint out of the way under another name, instead of the one that was there before."""
        aside = folder.with_name(folder.name + DAMAGED)
        _remove(aside)
        folder.rename(aside)

    def rotate(self, keep: int) -> list[Manifest]:
        """Delete all but the ``keep`` newest checkpoints; the manifests of those that stay."""
        for folder in self.found()[keep:]:
            _remove(folder)
        return self.manifests()

    def remove_unused_rows(self, shards: Iterable[int], used_besides: Mapping[int, Iterable[str]]) -> None:
        """Delete the files of frames of these ``shards`` that no checkpoint has any use for, nor ``used_besides`` says.

        Nothing is deleted while a checkpoint cannot be read: it may be a whole one, on a disk that is slow to show it.

        Raises:
            ValueError: if a folder of frames is a symbolic link: what is behind it is not this run's.
        """
        self.check_links()
        kept = self.manifests()
        if len(kept) < len(self.found()):
            return
        for number in shards:
            used = {rows.file for manifest in kept if number in manifest.rows for rows in manifest.rows[number].files}
            used |= set(used_besides.get(number, ()))
            for path in self.shard_folder(number).glob("*"):
                if path.name not in used:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)

    def remove_rows(self, shards: Iterable[int]) -> None:
        """Delete all frames of these ``shards``, and their folder with the last of them."""
        for number in shards:
            shutil.rmtree(self.shard_folder(number), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.rows.rmdir()

    def remove(self) -> None:
        """Delete everything in the run's folder."""
        shutil.rmtree(self.root, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a folder as far as that goes; of a link the link only."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
