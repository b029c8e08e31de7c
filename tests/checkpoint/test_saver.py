"""A checkpoint is written whole or not at all, by all ranks or by none."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.loader import Choice, choose, empty, load_frames, load_tensors, on_every_rank
from mpdqn.checkpoint.manifest import DamagedCheckpoint, Manifest, WrongCheckpoint
from mpdqn.checkpoint.saver import NotSaved, Saved, Saver
from mpdqn.mesh import World
from mpdqn.replay import VirtualShards
from tests.checkpoint.test_manifest import example
from tests.distributed import run_ranks

FRAME = (1, 40, 40)


def manifest(rounds: int) -> Manifest:
    return replace(example(0), round=rounds, files={}, tensors={}, rows={})


def make_shards(capacity: int = 400, owned: list[int] | None = None) -> VirtualShards:
    return VirtualShards(
        observation_shape=FRAME, num_shards=2, capacity=capacity, envs_per_shard=1, seed=0, stack=1, owned=owned
    )


def fill(shards: VirtualShards, steps: int) -> None:
    n = len(shards.owned)
    flags = torch.zeros(n, dtype=torch.bool)
    for _ in range(steps):
        frames = torch.randint(256, (n, *FRAME), dtype=torch.uint8)
        shards.append(
            observation=frames,
            action=torch.zeros(n, dtype=torch.int64),
            reward=torch.zeros(n),
            terminated=flags,
            truncated=flags,
            next_observation=frames,
        )


def saved(saver: Saver, state: dict[str, torch.Tensor], rounds: int) -> Saved | NotSaved:
    saver.start(state, manifest(rounds))
    saver.wait()
    outcome = saver.result()
    assert outcome is not None
    assert saver.result() is None, "it is told once"
    return outcome


KINDS = {
    "float64": torch.rand(3, 4, dtype=torch.float64),
    "bfloat16": torch.rand(5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "columns": torch.rand(4, 6)[:, ::2],
    "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


def test_tensors_of_all_kinds_come_back(alone: World, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert isinstance(saved(Saver(alone, folder, keep=2), KINDS, 1), Saved)
    choice = choose(alone, folder, (), lambda found, path: None)
    assert choice is not None
    targets = empty(choice, list(KINDS))
    load_tensors(alone, choice, targets)
    for name, tensor in KINDS.items():
        assert torch.equal(targets[name], tensor), name
        assert targets[name].dtype == tensor.dtype
    for path in folder.folder(1).iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK")), "no pickle, no archive of torch.save"


def test_the_newest_are_kept_and_frames_that_none_uses_deleted(alone: World, tmp_path: Path) -> None:
    folder, shards = CheckpointFolder(tmp_path), make_shards(40)
    saver = Saver(alone, folder, keep=2, shards=shards)
    for rounds in range(1, 6):
        fill(shards, 15)
        assert isinstance(saved(saver, {"x": torch.ones(1)}, rounds), Saved)
    assert [m.round for m in folder.manifests()] == [5, 4]
    used = {r.file for m in folder.manifests() for r in m.rows[1].files}
    assert {p.name for p in folder.shard_folder(1).iterdir()} == used
    assert "000000000001.rows" not in used
    choice = choose(alone, folder, shards.owned, lambda found, path: None)
    assert choice is not None
    other = make_shards(40)
    for v in (0, 1):
        other[v].written[:] = shards[v].written
    load_frames(choice, other)
    assert all((other[v].frames == shards[v].frames).all() for v in (0, 1))


def test_a_draft_is_never_taken(alone: World, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(Saver(alone, folder, keep=2), {"x": torch.ones(1)}, 1)
    folder.folder(1).rename(folder.draft(2))
    assert choose(alone, folder, (), lambda found, path: None) is None
    folder.remove_drafts()
    assert not list(folder.root.glob("0*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this system mounts no small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("what", ["tensors", "frames"])
def test_a_full_disk_leaves_what_there_was(what: str, alone: World, small_disk: Path) -> None:
    folder, shards = CheckpointFolder(small_disk), make_shards(4_000)
    saver = Saver(alone, folder, keep=2, shards=shards)
    fill(shards, 100)
    assert isinstance(saved(saver, {"x": torch.ones(1_000)}, 1), Saved)
    before = {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()}
    fill(shards, 50 if what == "tensors" else 900)
    outcome = saved(saver, {"x": torch.ones(500_000 if what == "tensors" else 1)}, 2)
    assert isinstance(outcome, NotSaved)
    assert "the checkpoint of round 2 was not written: [Errno 28] No space left on device" in str(outcome)
    assert {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()} == before
    assert isinstance(saved(saver, {"x": torch.ones(2_000)}, 3), Saved if what == "tensors" else NotSaved)
    choice = choose(alone, folder, shards.owned, lambda found, path: None)
    assert choice is not None
    assert choice.manifest.round == (3 if what == "tensors" else 1)


def on_two_ranks(out: Path) -> list[str]:
    told = []
    with World.open("cpu", 30) as world:
        folder = CheckpointFolder(out)
        shards = make_shards(owned=[world.rank])
        saver = Saver(world, folder, keep=2, shards=shards)
        fill(shards, 20)
        state = {"both": torch.full((3,), 7.0), f"of {world.rank}": torch.full((2,), float(world.rank))}
        told.append(str(type(saved(saver, state, 1)).__name__))
        if world.rank == 1:  # its frames cannot be written
            folder.shard_folder(1).rename(out / "aside")
            folder.shard_folder(1).touch()
        world.barrier()
        fill(shards, 5)
        told.append(str(saved(saver, state, 2)))
        if world.rank == 1:
            folder.shard_folder(1).unlink()
            (out / "aside").rename(folder.shard_folder(1))
        world.barrier()
        choice = choose(world, folder, [1 - world.rank], lambda found, path: None)
        assert choice is not None
        assert choice.manifest.round == 1
        targets = empty(choice, ["both", f"of {1 - world.rank}"])
        load_tensors(world, choice, targets)
        told.append(json.dumps({name: t.tolist() for name, t in targets.items()}))
        told.append(",".join(sorted(p.name for p in folder.shard_folder(world.rank).iterdir())))
        told += what_one_rank_finds(world, choice)
        world.barrier()
    return told


def what_one_rank_finds(world: World, choice: Choice) -> list[str]:
    """What both ranks raise where a tensor is missing on rank 1, and where its frames are cut after they were found
    whole."""
    told = []
    with pytest.raises(WrongCheckpoint) as wrong:
        load_tensors(world, choice, {"missing": torch.zeros(3)} if world.rank == 1 else {})
    told.append(str(wrong.value))
    (v,) = choice.rows
    rows = choice.manifest.rows[v].files[-1]
    if world.rank == 1:
        with (choice.rows[v] / rows.file).open("r+b") as file:
            file.truncate(rows.entry.bytes // 2)
    shards = make_shards(owned=[v])
    shards[v].written[:] = torch.tensor(rows.stop)
    with pytest.raises(DamagedCheckpoint) as damaged, on_every_rank(world, choice):
        load_frames(choice, shards)
    return [*told, str(damaged.value)]


@pytest.mark.pool
def test_what_one_rank_cannot_write_no_rank_has_written(tmp_path: Path) -> None:
    for rank, told in enumerate(run_ranks(on_two_ranks, tmp_path, num_ranks=2)):
        assert told[0] == "Saved"
        assert "the checkpoint of round 2 was not written: [Errno" in told[1]
        assert told[1].endswith("(rank 1)")
        assert json.loads(told[2]) == {"both": [7.0] * 3, f"of {1 - rank}": [1.0 - rank] * 2}
        assert told[3] == "000000000001.rows"
        assert "holds nothing as missing and float32 [3] is needed" in told[4]
        assert "shard-0/000000000001.rows ended while it was read" in told[5], "the shard that rank 1 reads"


def test_training_waits_only_for_what_it_would_overwrite(alone: World, tmp_path: Path) -> None:
    shards = make_shards(40)
    saver = Saver(alone, CheckpointFolder(tmp_path), keep=1, shards=shards)
    fill(shards, 5)
    saver.start({"x": torch.ones(30_000_000)}, manifest(1))
    saver.make_way(1)
    assert saver.busy, "nothing was in the way"
    saver.make_way(100)
    assert saver._frames_written.is_set()
    saver.wait()
    assert isinstance(saver.result(), Saved)


def test_every_folder_that_a_checkpoint_is_named_in_is_on_the_disk(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own folder was left out: after a power failure it could lack ``checkpoints``."""
    synced, fsync = set(), os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", watched)
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    folder, shards = CheckpointFolder(run, scratch), make_shards()
    fill(shards, 5)
    assert isinstance(saved(Saver(alone, folder, keep=1, shards=shards), {"x": torch.ones(1)}, 1), Saved)
    assert synced >= {run, folder.root, scratch, folder.rows, folder.shard_folder(0), folder.shard_folder(1)}
