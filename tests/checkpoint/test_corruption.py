"""The corruption drill: whatever happens to a file of a checkpoint, nothing wrong is ever loaded.

Each case damages one file of the newest of two checkpoints. The run then goes on from that one, if what it holds is as
it was; or from the one before; or ends with an error of one line that names what is wrong. What a new trainer has in
memory after loading is compared, bit by bit, with what the run had in memory as it saved.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.loader import Choice
from mpdqn.checkpoint.manifest import FORMAT, MANIFEST, DamagedCheckpoint, Manifest, WrongCheckpoint, _digest
from mpdqn.checkpoint.saver import Saver
from mpdqn.mesh import World
from mpdqn.replay import VirtualShards
from mpdqn.train import train
from mpdqn.train.check import check
from mpdqn.train.checkpoints import choose_checkpoint, go_on
from mpdqn.train.config import TrainJob
from mpdqn.train.loop import Trainer
from mpdqn.train.resume import recorded_config, run_id
from mpdqn.train.run import train_in
from mpdqn.train.state import trainer_state
from tests.train.settings import small
from tests.train.stopping import train_for

CASES = 240
seen: list[str] = []
rounds: list[int] = []
"""Of the checkpoints that were loaded, one for each case that was not refused."""

Memory = dict[str, bytes]
"""What a run has in memory, by name: each tensor, and each frame that a ring of replay holds."""


@dataclass
class Original:
    """A run that was stopped, with two checkpoints."""

    folder: Path
    job: TrainJob
    run: str
    world: World
    files: list[Path]
    """Of the newest checkpoint, relative to the run's folder: manifest, tensors, and the frames that it uses."""
    saved: dict[int, Memory]
    """What the run had in memory as it saved, by the round of the checkpoint."""
    final: dict[str, torch.Tensor]
    """Weights of the end."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"Original({self.folder})")  # for Hypothesis: what was saved is too much to print


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Original]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = {"capacity": 500, "checkpoint_every": 280}
    whole = train(small(tmp_path_factory.mktemp("whole"), **config))
    saved: dict[int, Memory] = {}
    start = Saver.start

    def note(self: Saver, state: dict[str, torch.Tensor], manifest: Manifest) -> None:
        assert self._shards is not None
        saved[manifest.round] = memory(state, self._shards)
        start(self, state, manifest)

    with World.open("cpu", 60) as world:
        with patch.object(Saver, "start", note):
            folder = train_for(world, small(tmp_path_factory.mktemp("run"), **config), 90).folder
        newest, older = CheckpointFolder(folder).manifests()
        rows = {one.file for one in newest.rows[0].files} & {one.file for one in older.rows[0].files}
        assert rows, "they share frames"
        checkpoint = CheckpointFolder(folder).folder(newest.round).relative_to(folder)
        files = [checkpoint / name for name in (MANIFEST, *newest.files)]
        files += [Path("checkpoints/rows") / f"shard-{v}" / r.file for v, s in newest.rows.items() for r in s.files]
        job = check(recorded_config(folder))
        yield Original(folder, job, run_id(folder), world, files, saved, torch.load(whole.folder / "weights.pt"))
    torch.set_num_threads(threads)


def memory(tensors: dict[str, torch.Tensor], shards: VirtualShards) -> Memory:
    """Copy the tensors of a run and the frames that its rings hold."""
    held = {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
    for v in shards.owned:
        shard = shards[v]
        for env, written in enumerate(shard.written.tolist()):
            for position in range(max(0, written - shard.length), written):
                frame = shard.frames[env * shard.length + position % shard.length]
                held[f"frame {v}.{env}.{position}"] = frame.tobytes()
    return held


def loaded(original: Original, choice: Choice) -> Memory:
    """Load a checkpoint into a new trainer and copy what it has in memory then."""
    trainer = Trainer(original.world, original.job)
    try:
        besides = go_on(trainer, choice)
        assert trainer.shards is not None
        return memory(trainer_state(trainer) | besides, trainer.shards)
    finally:
        trainer.close()


def copied(original: Original, to: Path) -> Path:
    """The run's folder once more; files are linked, and replaced when they are damaged."""
    return Path(shutil.copytree(original.folder, to / original.folder.name, copy_function=os.link))


def put(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def truncate(path: Path, choice: random.Random) -> None:
    data = path.read_bytes()
    put(path, data[: choice.randrange(len(data))])


def flip(path: Path, choice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    put(path, bytes(data))


def remove(path: Path, choice: random.Random) -> None:
    path.unlink()


def rename(path: Path, choice: random.Random) -> None:
    path.rename(path.with_name(f"{choice.randrange(10**12):012d}{path.suffix}"))


def append(path: Path, choice: random.Random) -> None:
    put(path, path.read_bytes() + choice.randbytes(choice.randrange(1, 100)))


def garbage(path: Path, choice: random.Random) -> None:
    put(path, choice.randbytes(len(path.read_bytes())))


def zero_a_block(path: Path, choice: random.Random) -> None:
    """What a disk leaves that lost a block; the bytes there may have been zeros."""
    data = bytearray(path.read_bytes())
    begin = choice.randrange(len(data))
    data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    put(path, bytes(data))


def write_again(path: Path, choice: random.Random) -> None:
    """No damage: the same bytes in a new file."""
    put(path, path.read_bytes())


def swap(path: Path, choice: random.Random) -> None:
    """With another file of the same kind, if there is one."""
    others = sorted(p for p in path.parent.parent.glob(f"*/*{path.suffix}") if p != path)
    if others:
        other = choice.choice(others)
        one, two = path.read_bytes(), other.read_bytes()
        put(path, two)
        put(other, one)


def rename_the_checkpoint(path: Path, choice: random.Random) -> None:
    checkpoint = max(p for p in path.parents[1 if path.suffix != ".rows" else 2].iterdir() if p.name.isdigit())
    checkpoint.rename(checkpoint.with_name(f"{int(checkpoint.name) + choice.randrange(1, 50):012d}"))


def rewrite(change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[Path, random.Random], None]:
    """A manifest that somebody else wrote, with a digest that is right."""

    def apply(path: Path, choice: random.Random) -> None:
        root = next(p for p in path.parents if p.name == "checkpoints")
        manifest = max(p for p in root.iterdir() if p.name.isdigit()) / MANIFEST
        body = json.loads(manifest.read_text())
        del body["digest"]
        change(body, choice)
        put(manifest, json.dumps(body | {"digest": _digest(body)}).encode())

    return apply


def from_a_later_version(body: dict[str, Any], choice: random.Random) -> None:
    body["format"] = FORMAT + choice.randrange(1, 5)


def of_another_network(body: dict[str, Any], choice: random.Random) -> None:
    name = choice.choice(sorted(body["parameters"]))
    body["parameters"][name][1][0] += 1


def of_another_run(body: dict[str, Any], choice: random.Random) -> None:
    body["run"] = f"{choice.getrandbits(128):032x}"


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    **{f.__name__: f for f in (truncate, flip, remove, rename, append, garbage, zero_a_block, write_again, swap)},
    "rename_the_checkpoint": rename_the_checkpoint,
    **{f.__name__: rewrite(f) for f in (from_a_later_version, of_another_network, of_another_run)},
}
NEVER_TAKEN = {"truncate", "flip", "remove", "rename", "append", "garbage", "rename_the_checkpoint"}
"""Damages that leave nothing of the newest checkpoint to go on from."""
REFUSED = {"from_a_later_version", "of_another_network", "of_another_run"}


def assert_as_it_was(choice: Choice, original: Original) -> None:
    """Load the checkpoint: it must leave in memory what the run had there, every bit."""
    assert choice.manifest == Manifest.read(CheckpointFolder(original.folder).folder(choice.manifest.round))
    saved, found = original.saved[choice.manifest.round], loaded(original, choice)
    assert found.keys() == saved.keys()
    assert [name for name in saved if found[name] != saved[name]] == []


@settings(max_examples=CASES, derandomize=True, database=None, deadline=None)
@given(damage=st.sampled_from(sorted(DAMAGES)), which=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def drill(original: Original, scratch: Path, damage: str, which: int, seed: int) -> None:
    folder = copied(original, scratch / str(len(seen)))
    # Manifest, tensors and frames alike, though there are more files of frames.
    kinds = [original.files[0], original.files[1], original.files[2 + which // 3 % (len(original.files) - 2)]]
    path = folder / kinds[which % 3]
    DAMAGES[damage](path, random.Random(seed))
    seen.append(f"{damage} {path.suffix}")
    refusal: ValueError | None = None
    choice: Choice | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*the run goes on from", UserWarning)
            choice = choose_checkpoint(original.world, original.job, folder, original.run)
    except (DamagedCheckpoint, WrongCheckpoint) as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert str(folder) in str(refusal)
        assert isinstance(refusal, WrongCheckpoint) == (damage in REFUSED), refusal
    else:
        assert choice is not None
        assert_as_it_was(choice, original)
        rounds.append(choice.manifest.round)
        newest = int(original.files[0].parts[1])
        assert damage not in REFUSED
        assert choice.manifest.round == newest or damage != "write_again"
        assert choice.manifest.round < newest or damage not in NEVER_TAKEN
        assert bool(choice.damaged) == (choice.manifest.round < newest)
    shutil.rmtree(folder)


def test_nothing_wrong_is_ever_loaded(original: Original, tmp_path: Path) -> None:
    drill(original, tmp_path)
    assert len(seen) >= 200
    assert len(rounds) >= 120
    assert sorted(set(rounds)) == sorted(original.saved)[-2:], "the newest was loaded, and the one before"
    assert len({case.split()[0] for case in seen}) == len(DAMAGES)
    assert {
        f"{damage} {suffix}" for damage in ("truncate", "flip", "remove") for suffix in (".json", ".bin", ".rows")
    } <= {*seen}


@pytest.mark.parametrize(("damage", "which"), [(flip, 1), (truncate, 0), (remove, -1)])
def test_a_run_goes_on_from_the_one_before(damage: Any, which: int, original: Original, tmp_path: Path) -> None:
    """To the same end; what it does not take is kept aside."""
    folder = copied(original, tmp_path)
    for path in folder.rglob("*"):  # a run that goes on writes to its files
        if path.is_file():
            put(path, path.read_bytes())
    damage(folder / original.files[which], random.Random(1))
    with pytest.warns(UserWarning, match="the run goes on from .*checkpoints/0"):
        train_in(original.world, check(replace(recorded_config(folder), checkpoint_at_end=True)))
    assert list((folder / "checkpoints").glob("*.damaged"))
    weights = torch.load(folder / "weights.pt")
    assert all(torch.equal(t, original.final[n]) for n, t in weights.items())
