"""What cannot be gone on with is refused before any work, with both values and the next step, and stays as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.manifest import DamagedCheckpoint, WrongCheckpoint, _digest
from mpdqn.cli import main
from mpdqn.mesh import World
from mpdqn.replay.rows import FRAMES, OWNER
from mpdqn.train import TrainConfig, TrainResult, mapped, session, train
from mpdqn.train import run as running
from mpdqn.train.check import check
from mpdqn.train.config import TrainJob
from mpdqn.train.lock import FolderInUse, RunLock, in_use
from mpdqn.train.resume import recorded_config, run_id
from mpdqn.train.run import train_in
from mpdqn.train.status import describe, read_status
from mpdqn.train.stop import StopSignal
from tests.distributed import run_ranks
from tests.train.settings import small
from tests.train.stopping import train_for


def stop_a_run(out: Path, **settings: Any) -> Path:
    """The folder of a run that was stopped after 90 rounds."""
    with World.open("cpu", 60) as world:
        return train_for(world, small(out, **settings), 90).folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stop_a_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The same run without a stop."""
    return train(small(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def refused(folder: Path, message: str, error: type[Exception] = ValueError, **settings: Any) -> None:
    """That going on is refused in one line, and nothing of the run changes."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}
    with pytest.raises(error, match=re.escape(message)) as caught:
        train(resume=folder, **settings)
    assert "\n" not in str(caught.value)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}
    changing = {folder / "status.json", folder / ".lock", folder / "environment.json", folder / "config.json"}
    assert {p: b for p, b in before.items() if p not in changing} == {
        p: b for p, b in after.items() if p not in changing
    }


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    refused(tmp_path, "is empty; give the folder that a training run made")
    refused(tmp_path / "nowhere", "does not exist; give the folder that a training run made")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is no folder; give the folder that a training run made")
    compared = tmp_path / "compare"
    compared.mkdir()
    (compared / "records.jsonl").touch()
    refused(compared, "holds no training run to go on with")
    (compared / "config.json").write_text('{"config": {"layouts": ["dp2"]}, "run": "1"}')
    refused(compared, "has the settings ['layouts'] too many and")


def test_another_run_than_the_one_in_the_folder(folder: Path) -> None:
    refused(folder, f"env is minatar-freeway but the run in {folder} has minatar-breakout", env="minatar-freeway")
    refused(folder, f"agent is rainbow but the run in {folder} has dqn; leave it out", agent="rainbow")
    refused(folder, f"num_shards is 2 but the run in {folder} has 4", num_shards=2)
    refused(folder, f"frames is 800 but the run in {folder} has 1600; give as many or more", frames=800)
    config = replace(recorded_config(folder), seed=1)
    with pytest.raises(ValueError, match=r"seed is 1 but the run in .* has 0"):
        train(config)


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    """The folder on a file system that is really read-only, to root as to others."""
    if os.geteuid():
        pytest.skip("only root can mount a read-only folder")
    bound = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, text=True)
    if bound.returncode:
        pytest.skip(f"this system mounts no folder: {bound.stderr.strip()}")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_cannot_be_written(read_only: Path) -> None:
    refused(read_only, f"--resume {read_only} cannot be written (Read-only file system)")


def test_a_run_that_is_being_trained(folder: Path) -> None:
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert read_status(folder).state == "killed", "nobody holds its lock"
    with RunLock(folder):
        assert in_use(folder)
        assert read_status(folder).state == "running"
        assert describe(folder).startswith("state        running")
        refused(folder, "is being trained by process", FolderInUse)
        job = check(TrainConfig(**vars(recorded_config(folder)) | {"resume": None}))
        with World.open("cpu", 60) as world, pytest.raises(FolderInUse, match=r"is being trained by process \d+ on "):
            train_in(world, replace(job, config=replace(job.config, resume=folder)))
    assert not in_use(folder)


class Intruding(StopSignal):
    """While a run is under way, `attempt` is made once; then the run is stopped."""

    def __init__(self, attempt: Callable[[], None]) -> None:
        self._attempt, self._rounds = attempt, 0
        super().__init__()

    @property
    def received(self) -> bool:  # type: ignore[override]
        self._rounds += 1
        if self._rounds == 70:  # the first update came after round 62
            self._attempt()
        return self._rounds > 70

    @received.setter
    def received(self, value: bool) -> None:
        """It begins as not received."""


def test_replay_that_a_live_run_has_mapped_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped had its replay there; its files were cleared away, and another run has its own there now.
    Resuming the first deleted the frames of the second while that trained."""
    scratch = tmp_path / "scratch"
    first = stop_a_run(tmp_path / "first", replay_dir=scratch)
    for path in scratch.glob("shard-*"):
        shutil.rmtree(path)
    job = check(recorded_config(first))  # and as where the second began a moment later
    attempts: list[str] = []

    def intrude() -> None:
        before = {path: path.stat().st_ino for path in scratch.glob(f"shard-*/{FRAMES}")}
        assert len(before) == 4
        with monkeypatch.context() as patch:
            patch.setattr(running, "StopSignal", StopSignal)
            with pytest.raises(FolderInUse) as late:
                train_in(world, job)
            with pytest.raises(FolderInUse) as early:
                train(resume=first)
            with pytest.raises(FolderInUse) as fresh:
                train(small(tmp_path / "third", replay_dir=scratch))
        attempts.extend(str(caught.value) for caught in (early, fresh, late))
        assert {path: path.stat().st_ino for path in scratch.glob(f"shard-*/{FRAMES}")} == before
        assert not (tmp_path / "third").exists() or not list((tmp_path / "third").iterdir())

    monkeypatch.setattr(running, "StopSignal", lambda: Intruding(intrude))
    with World.open("cpu", 60) as world:
        second = train_in(world, check(small(tmp_path / "second", replay_dir=scratch)))
    assert second.stopped_at == 8 * 71
    assert len(attempts) == 3
    for text in attempts:
        assert text.startswith(f"--replay-dir {scratch} has the replay of a live run, shard 0 of process {os.getpid()}")
        assert "\n" not in text
    assert read_status(second.folder).state == "stopped"
    assert read_status(first).state == "stopped"


def frames_in(scratch: Path) -> dict[Path, int]:
    """The mapped files of all shards; a new file has another inode."""
    return {path: path.stat().st_ino for path in scratch.glob(f"shard-*/{FRAMES}")}


def test_replay_of_a_stopped_run_is_left_to_it(tmp_path: Path) -> None:
    """No lock tells of it. A folder that names its --replay-dir, such as a foreign one, had its frames deleted."""
    scratch = tmp_path / "scratch"
    foreign = stop_a_run(tmp_path / "foreign", replay_dir=tmp_path / "elsewhere")
    mine = stop_a_run(tmp_path / "mine", replay_dir=scratch)
    about = json.loads((foreign / "config.json").read_text())
    about["config"]["replay_dir"] = str(scratch)
    (foreign / "config.json").write_text(json.dumps(about))
    before, theirs, own = frames_in(scratch), run_id(foreign)[:8], run_id(mine)[:8]
    message = f"{scratch / 'shard-0'} holds replay of run {own} but {foreign} holds run {theirs}; give another"
    refused(foreign, message)
    refused(foreign, message, replay_dir=scratch)  # not with the user's word either
    assert frames_in(scratch) == before
    assert len(before) == 4
    assert train(resume=mine).rows[-1]["frames"] == 1_600


def test_replay_without_a_mark(tmp_path: Path) -> None:
    """Of the version before, or another tool's: only the user knows."""
    scratch = tmp_path / "scratch"
    folder = stop_a_run(tmp_path / "runs", replay_dir=scratch)
    for path in scratch.glob(f"shard-*/{OWNER}"):
        path.unlink()
    before, run = frames_in(scratch), run_id(folder)[:8]
    frames = scratch / "shard-0" / FRAMES
    refused(
        folder,
        f"{frames} has no mark of a run, and would be deleted to go on with run {run}; if it is that run's, give "
        f"--replay-dir {scratch} again, else another --replay-dir",
    )
    assert frames_in(scratch) == before
    assert main(["train", "--resume", str(folder)]) == 2  # its default of --replay-dir is the folder's word
    assert frames_in(scratch) == before
    assert main(["train", "--resume", str(folder), f"--replay-dir={scratch}"]) == 0
    assert read_status(folder).state == "finished"
    assert {path.read_text() for path in scratch.glob(f"shard-*/{OWNER}")} == {f"{run_id(folder)}\n"}


def test_a_mark_that_is_a_link(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    folder = stop_a_run(tmp_path / "runs", replay_dir=scratch)
    (scratch / "shard-1" / OWNER).rename(tmp_path / "mark")
    (scratch / "shard-1" / OWNER).symlink_to(tmp_path / "mark")
    before = frames_in(scratch)
    refused(folder, f"{scratch / 'shard-1' / OWNER} is a symbolic link but must be a file of its own")
    assert frames_in(scratch) == before


def test_a_mark_is_written_over_nothing_else(tmp_path: Path) -> None:
    """Neither through a link in the place of a shard's folder, nor over a file that only has its name."""
    job = check(small(tmp_path / "runs", replay_dir=tmp_path / "scratch", num_shards=1))
    shard, precious = tmp_path / "scratch" / "shard-0", tmp_path / "elsewhere" / OWNER
    precious.parent.mkdir()
    precious.write_text("precious")
    shard.symlink_to(precious.parent)
    with pytest.raises(ValueError, match="shard-0 is a symbolic link but must be a folder"):
        mapped.mark(job, [0], "0" * 32)
    shard.unlink()
    shutil.copytree(precious.parent, shard)
    with pytest.raises(ValueError, match="shard-0 already holds something else"):
        mapped.mark(job, [0], "0" * 32)
    assert precious.read_text() == (shard / OWNER).read_text() == "precious"
    (shard.parent / "shard-1").write_text("no folder")
    (shard / OWNER).write_text("0" * 32)
    (shard / FRAMES).write_text("frames")
    two = replace(job, config=replace(job.config, num_shards=2))
    with pytest.raises(ValueError, match="shard-1 already holds something else"):
        mapped.clear(two, [0, 1], "0" * 32)
    assert (shard / FRAMES).read_text() == "frames"
    (shard / FRAMES).unlink()
    (shard / OWNER).write_text("1" * 32)  # of a run that never had frames there
    mapped.mark(job, [0], "0" * 32)
    assert mapped.owner(shard) == "0" * 32
    (shard / FRAMES).write_text("frames")
    with pytest.raises(ValueError, match="shard-0 already holds something else"):
        mapped.mark(job, [0], "2" * 32)


@pytest.mark.pool
def test_every_rank_refuses_replay_of_another_run(tmp_path: Path) -> None:
    """Shard 3 is the second rank's; the first deleted its own, and then waited for the second."""
    scratch = tmp_path / "scratch"
    folder = stop_a_run(tmp_path / "runs", replay_dir=scratch)
    (scratch / "shard-3" / OWNER).write_text("another\n")
    before = frames_in(scratch)
    job = check(replace(recorded_config(folder), layout="dp2"))
    told = run_ranks(refusal, job, num_ranks=2)
    assert told[0] == told[1]
    assert told[0].startswith(f"{scratch / 'shard-3'} holds replay of run another but {folder} holds run ")
    assert frames_in(scratch) == before


def refusal(job: TrainJob) -> str:
    """What a rank is told that goes on with ``job``."""
    with World.open("cpu", 60) as world, pytest.raises(ValueError, match="holds replay of run") as caught:
        train_in(world, job)
    return str(caught.value)


def test_replay_of_a_run_that_was_killed_while_it_was_mapped(tmp_path: Path, whole: TrainResult) -> None:
    """At each moment: a folder without a mark, a mark half written, a mark without frames, and frames."""
    scratch = tmp_path / "scratch"
    folder = stop_a_run(tmp_path / "runs", replay_dir=scratch)
    for number in range(3):
        (scratch / f"shard-{number}" / FRAMES).unlink()
    for number in range(2):
        (scratch / f"shard-{number}" / OWNER).unlink()
    (scratch / "shard-1" / f"{OWNER}.part").touch()
    assert train(resume=folder).episodes == whole.episodes


def test_an_attempt_to_go_on_elsewhere_that_was_killed_is_tried_again(tmp_path: Path, whole: TrainResult) -> None:
    """It had mapped its replay there, and its folder did not say so yet."""
    folder = stop_a_run(tmp_path / "runs", replay_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert train(resume=folder, replay_dir=tmp_path / "two").episodes == whole.episodes


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    result = train(small(tmp_path, checkpoint_every=800))
    assert not CheckpointFolder(result.folder).found(), "a run that has ended needs none"
    for name in ("config.json", "environment.json", "records.jsonl"):
        assert str(tmp_path) not in (result.folder / name).read_text(), "where it lay is nobody's business"
    refused(result.folder, "is finished, all its 1600 frames are played; give more --frames")
    refused(result.folder, "is finished and has no checkpoint of its end, to train on to 2000 frames", frames=2_000)


def test_a_run_that_kept_its_end_is_trained_on(tmp_path: Path) -> None:
    """With a lag too: the chunk after the end is played already. ε and β have their own lengths."""
    settings: dict[str, Any] = {"actor_lag": 1, "checkpoint_at_end": True, "log_every": 400}
    whole = train(small(tmp_path / "whole", **settings, frames=2_000))
    short = train(small(tmp_path / "short", **settings))
    longer = train(resume=short.folder, frames=2_000)
    assert longer.episodes == whole.episodes
    assert [row["frames"] for row in longer.rows] == [400, 800, 1_200, 1_600, 2_000]


def test_checkpoints_of_another_run_or_network(folder: Path, tmp_path: Path) -> None:
    other = stop_a_run(tmp_path / "other", seed=1)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    refused(folder, "is of run", WrongCheckpoint)
    network = tmp_path / "mine.py"
    source = (Path(__file__).parent / "network.py").read_text()
    network.write_text(source)
    mine = stop_a_run(tmp_path / "mine", network=f"{network}:make_network")
    network.write_text(source.replace("Conv2d(c, 4, 3", "Conv2d(c, 5, 3").replace("Linear(4 *", "Linear(5 *"))
    refused(
        mine,
        "is of another network: 1.weight is float32 [4, 4, 3, 3] there and float32 [5, 4, 3, 3]",
        WrongCheckpoint,
        trust=True,
    )


def test_a_folder_of_an_earlier_version(folder: Path, whole: TrainResult, tmp_path: Path) -> None:
    """Its configuration lacks what was added since. A setting whose default is not what was done before needs another
    answer than `ADDED`."""
    about = json.loads((Path(__file__).parent / "config-0.1.0.json").read_text())
    about["run"] = run_id(folder)
    (folder / "config.json").write_text(json.dumps(about))
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    again = train(resume=folder)
    assert again.episodes == whole.episodes
    del about["config"]["env_workers"]
    (older / "config.json").write_text(json.dumps(about))
    refused(older, "has the settings [] too many and ['env_workers'] too few; resume with the version of mpdqn that")
    with pytest.raises(ValueError, match=r"that began the run \(0\.1\.0\)"):
        train(resume=older)


def test_no_checkpoint_that_is_whole(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("*/rank-0.bin"):
        path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "none of the 1 checkpoints in", DamagedCheckpoint)


def test_a_checkpoint_whose_digests_are_right_and_whose_content_is_not(folder: Path) -> None:
    """It raised TypeError, KeyError or RuntimeError, on the rank that came to it first."""
    (path,) = (folder / "checkpoints").glob("0*/manifest.json")
    body = json.loads(path.read_text())
    del body["digest"]
    counters, tensors = body["counters"], body["tensors"]
    losses, episodes = tensors["run.losses"], tensors["run.episodes"]
    without_losses = {name: value for name, value in tensors.items() if name != "run.losses"}
    rounds, updates = body["round"], body["updates"]
    without = {name: value for name, value in tensors.items() if not name.startswith("games.2.")}
    ring = tensors["replay.1.written"]
    for changes, message in (
        ({"counters": counters | {"row_before": None}}, "is damaged: its counter row_before is 'None'"),
        ({"counters": counters | {"seconds": 10**400}}, "is damaged: its counter seconds is '1000"),
        ({"counters": counters | {"row_before": [1]}}, "is damaged: its counter row_before is '[1]'"),
        (
            {"counters": counters | {"row_before": [0, 8 * rounds + 1, 0]}},
            "is damaged: its counter row_before is '[0, ",
        ),
        (
            {"counters": counters | {"waiting_deliveries": 2**62}},
            "is damaged: its counter waiting_deliveries is '46116",
        ),
        ({"counters": counters | {"replay_lost": [4]}}, "is damaged: its counter replay_lost is '[4]'"),
        ({"updates": updates + 1}, f"but {rounds} rounds are {8 * rounds} and {updates}"),
        ({"tensors": without_losses}, "cannot be restored: run.losses is nothing, not float64 [k]; to resume from the"),
        (
            {"tensors": tensors | {"run.losses": losses | {"dtype": "int64"}}},
            "cannot be restored: run.losses is int64 [",
        ),
        (
            {"tensors": tensors | {"run.episodes": episodes | {"dtype": "uint8", "shape": [8], "bytes": 8}}},
            "cannot be restored: run.episodes is uint8 [8], not float64 [k, 4]",
        ),
        ({"counters": counters | {"steps_played": "9"}}, "is damaged: its counter steps_played is '9'"),
        ({"tensors": tensors | {"replay.1.written": ring | {"shape": [2, 1]}}}, "cannot be restored: "),
        ({"tensors": without}, "cannot be restored: KeyError('games.2."),
        ({"tensors": tensors | {"queue.0": ring}}, "cannot be restored: IndexError("),
    ):
        changed = body | changes
        path.write_text(json.dumps(changed | {"digest": _digest(changed)}))
        refused(folder, message, DamagedCheckpoint)


def test_a_checkpoint_that_cannot_be_restored_is_renamed_to_resume_from_the_one_before(
    tmp_path: Path, whole: TrainResult
) -> None:
    """Digests are checked before the choice; a tensor that is missing is found only after it."""
    folder = stop_a_run(tmp_path, checkpoint_every=400)
    newest, older = CheckpointFolder(folder).found()
    path = newest / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"], body["tensors"]["run.norms"]
    path.write_text(json.dumps(body | {"digest": _digest(body)}))
    refused(folder, f"{newest} cannot be restored: run.norms is nothing", DamagedCheckpoint)
    assert CheckpointFolder(folder).found() == [newest, older]
    newest.rename(tmp_path / "aside")
    assert train(resume=folder).episodes == whole.episodes


def test_a_run_without_a_checkpoint_begins_anew(folder: Path, whole: TrainResult) -> None:
    """It was killed before its first."""
    shutil.rmtree(folder / "checkpoints")
    again = train(resume=folder)
    assert again.folder == folder
    assert again.episodes == whole.episodes
    assert len(again.rows) == len(whole.rows)


def test_a_run_that_was_stopped_before_its_first_row(tmp_path: Path) -> None:
    whole = train(small(tmp_path / "whole", log_every=1_600))
    folder = stop_a_run(tmp_path / "runs", log_every=1_600)
    assert not (folder / "progress.csv").exists()
    (folder / "status.json").unlink()  # nor need there be a status
    result = train(resume=folder)
    assert result.episodes == whole.episodes
    assert [row["frames"] for row in result.rows] == [1_600]
    assert result.rows[0]["loss"] == whole.rows[0]["loss"], "of all updates, those before the stop too"


def test_frames_that_no_checkpoint_is_seen_to_use_stay_while_one_cannot_be_read(folder: Path) -> None:
    checkpoints = CheckpointFolder(folder)
    (manifest,) = checkpoints.manifests()
    before = sorted(checkpoints.rows.rglob("*.rows"))
    unread = checkpoints.folder(manifest.round) / "manifest.json"
    text = unread.read_text()
    unread.write_text("")
    checkpoints.remove_unused_rows(range(4), {})
    assert sorted(checkpoints.rows.rglob("*.rows")) == before
    unread.write_text(text)
    extra = checkpoints.shard_folder(1) / "000000000999.rows"
    extra.touch()
    checkpoints.remove_unused_rows(range(4), {})
    assert sorted(checkpoints.rows.rglob("*.rows")) == before


def test_replay_that_is_gone_is_said_and_filled_again(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """It lay on a disk of its own, which is not there any more."""
    scratch = tmp_path / "scratch"
    folder = stop_a_run(tmp_path / "runs", replay_dir=scratch, prioritized=True, lookahead=1, actor_lag=1)
    assert (scratch / f"rows-of-{folder.name}" / "shard-3").is_dir()
    assert (scratch / "shard-3" / FRAMES).is_file()
    shutil.rmtree(scratch / f"rows-of-{folder.name}" / "shard-3")
    with pytest.warns(
        UserWarning, match=r"the replay of shards \[3\] is gone: it was in .*shard-3 on .*began empty, and"
    ):
        result = train(resume=folder)
    assert result.rows[-1]["frames"] == 1_600
    status = read_status(folder)
    assert (status.state, status.replay_lost) == ("finished", (3,))
    assert "replay lost  shards [3]" in describe(folder)


def test_a_new_folder_for_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames come from where they were, and are written anew where they are to be; logs hear of neither place."""
    heard: list[Any] = []
    opened = session.open_logs
    monkeypatch.setattr(session, "open_logs", lambda *args, **named: heard.append(named) or opened(*args, **named))
    settings: dict[str, Any] = {"prioritized": True}
    whole = train(small(tmp_path / "whole", **settings))
    folder = stop_a_run(tmp_path / "runs", replay_dir=tmp_path / "one", **settings)
    result = train(resume=folder, replay_dir=tmp_path / "two", checkpoint_at_end=True)
    assert result.episodes == whole.episodes
    assert list((tmp_path / "two" / f"rows-of-{folder.name}").glob("shard-*/*.rows"))
    assert heard[-1]["config"]["replay_dir"] == "two"
    assert str(tmp_path) not in str([named["config"] for named in heard])
