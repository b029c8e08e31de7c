"""What a run's folder says of the run is checked value by value: it may be somebody else's."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpdqn.bench.evaluation import EvaluateConfig, evaluate_run
from mpdqn.checkpoint.files import DigestedFile
from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.cli import main
from mpdqn.files import open_to_append, write_whole
from mpdqn.layouts import Layout
from mpdqn.logs import open_logs
from mpdqn.records import Record, append_records
from mpdqn.train import load_run, train
from mpdqn.train.check import check
from mpdqn.train.folder import save_batches, save_policy, save_weights, write_config, write_record
from mpdqn.train.resume import recorded_config
from mpdqn.train.status import RUNNING, STOPPED, describe, now
from tests.train.settings import small

ESC = "\x1b[31mEVIL"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of version 0.1.0, of a run that was killed before its first checkpoint."""
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.json").write_text((Path(__file__).parent / "config-0.1.0.json").read_text())
    return place


def rewrite(folder: Path, **settings: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= settings
    (folder / "config.json").write_text(json.dumps(about))


def refused(folder: Path, message: str) -> None:
    """That the folder is refused in one printable line with this ``message``, to resume as to load."""
    for read in (lambda: train(resume=folder), lambda: load_run(folder)):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("layout", "name", "m"),
    [
        ("pp2-1f1b", "pp2-1f1b/m4", 4),
        ("dp2xpp2-1f1b@1", "dp2xpp2-1f1b/m4", 4),  # on a machine where one thread is a fair share
        ("pp2+stacked", "pp2-gpipe+stacked/m2", 2),
        ("pp2-1f1b/m2", "pp2-1f1b/m4", 2),  # its user said so
        ("pp2-1f1b", "pp2-gpipe/m4", 8),  # another layout's name
        ("dp2", "dp2", 1),
    ],
)
def test_micro_batches_of_an_earlier_version(layout: str, name: str, m: int, folder: Path) -> None:
    """There ``mpdqn train`` gave a pipeline without /m 4 micro-batches, here it is 8: such a run went on with 8."""
    rewrite(folder, layout=layout)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"layout": name}))
    assert Layout.parse(recorded_config(folder).layout, cores=2).num_microbatches == m


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("replay_dir", 7, "replay_dir is 7 but must be Path | None"),
        ("frames", "abc", "frames is 'abc' but must be int"),
        ("frames", True, "frames is True but must be int"),
        ("frames", None, "frames is None but must be int"),
        ("timeout", float("nan"), "timeout is nan, not a number"),
        ("double", 1, "double is 1 but must be bool | None"),
        ("lookahead", 2, "lookahead is 2 but must be Literal[0, 1]"),
        ("precision", ["bf16"], "precision is ['bf16'] but must be Literal["),
        ("agent", f"dqn{ESC}", r"agent is 'dqn\x1b[31mEVIL', not a line of text"),
        ("replay_dir", f"/tmp/{ESC}", "not a line of text"),
    ],
)
def test_a_setting_of_another_type(setting: str, value: object, message: str, folder: Path) -> None:
    """It was a TypeError where the setting was used first, or nonsense; escapes went to the terminal as they were."""
    rewrite(folder, **{setting: value})
    refused(folder, message)


@pytest.mark.parametrize("command", [["train", "--resume"], ["evaluate", "--run"]])
def test_the_command_says_it_in_one_line(command: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, frames="abc")
    assert main([*command, str(folder)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "frames is 'abc' but must be int" in line


def test_a_whole_number_that_python_gave_as_a_float(folder: Path) -> None:
    rewrite(folder, frames=1.6e3)
    assert type(recorded_config(folder).frames) is int


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"config": 7}', "\x1b", '{"config": {"env": 5}}'])
def test_a_configuration_that_cannot_be_read(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, str(folder))


def test_text_of_a_folder_is_printable(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    del about["config"]["env_workers"]
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "environment.json").write_text(json.dumps({"versions": {"mpdqn": f"9{ESC}"}}))
    with pytest.raises(ValueError, match=re.escape(r"that began the run (9\x1b[31mEVIL)")):
        recorded_config(folder)


def test_a_status_of_other_text_and_types(folder: Path) -> None:
    counts: dict[str, Any] = {"frames": 8, "total_frames": 16, "updates": 0}
    status = now(state=STOPPED, layout=ESC, problem=f"a\n{ESC}", row={"loss": float("nan")}, **counts)
    status.write(folder)
    assert all(line.isprintable() for line in describe(folder).split("\n"))
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frames": None}))
    with pytest.raises(ValueError, match=r"has no readable status\.json \(frames is None but must be int\)"):
        describe(folder)


def test_a_lock_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    """The file that it points to was overwritten."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (folder / ".lock").symlink_to(precious)
    message = f"{folder / '.lock'} is a symbolic link but must be a lock file of its own; delete the link"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(resume=folder)
    now(state=RUNNING, layout="single@1", frames=8, total_frames=16, updates=0).write(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        describe(folder)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / ".lock-shard-0").symlink_to(precious)
    with pytest.raises(ValueError, match=r"\.lock-shard-0 is a symbolic link"):
        train(replay_dir=scratch, out=tmp_path / "out")
    assert precious.read_text() == "kept"


def test_a_name_with_a_wide_blank_is_a_name(folder: Path) -> None:
    """As in Japanese and Chinese file names."""
    rewrite(folder, replay_dir="/data/my\u3000runs")
    assert recorded_config(folder).replay_dir == Path("/data/my\u3000runs")


WRITTEN_WHOLE = (
    *("config.json", "environment.json", "status.json", "weights.pt", "policy.pt2", "evaluation.md"),
    "failed-update-3-rank0.pt",
)
"""Every file of a run's folder that is written at once: a link in its place is replaced."""

APPENDED = ("records.jsonl", "progress.csv")
"""Every file that lines are added to: a link in its place is refused."""


def test_what_a_run_writes_into_its_folder_follows_no_link(folder: Path, tmp_path: Path) -> None:
    """Each writer by itself, with links in the places of its file and of the file under way."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    job = check(recorded_config(folder))
    for name in WRITTEN_WHOLE:
        for place in (folder / name, folder / f"{name}.part"):
            place.unlink(missing_ok=True)
            place.symlink_to(precious)
    for name in APPENDED:
        (folder / f"{name}.part").symlink_to(precious)
    write_config(folder, job, {}, "1")
    now(state=RUNNING, frames=0, total_frames=1, updates=0, layout="single@1").write(folder)
    save_weights(folder, {"w": torch.ones(1)})
    save_policy(folder, job.make_network(), job.agent, job.spec)
    save_batches(folder, 0, 3, [], {"w": torch.ones(1)})
    write_whole(folder / "evaluation.md", "")
    record = Record(
        experiment="train", row="", round=0, seed=0, settings={}, values={"frames": 1}, environment=job.environment
    )
    write_record(folder, record)
    append_records(folder / "records.jsonl", [record])
    with open_logs(folder, config={}) as logs:
        logs.write(1, {"loss": 1.0})
        logs.write(2, {"loss": 1.0, "new": 2.0})
    checkpoint = CheckpointFolder(folder)
    for path in (folder / "rank-0.bin", checkpoint.make_shard_folder(0) / "000000000001.rows"):
        path.symlink_to(precious)
        with DigestedFile(path) as file:
            file.write(memoryview(b"mine"))
        assert path.read_bytes() == b"mine"
    assert precious.read_text() == "kept"
    assert [path for path in folder.rglob("*") if path.is_symlink()] == []
    assert not list(folder.rglob("*.part"))
    assert {*WRITTEN_WHOLE, *APPENDED} <= {path.name for path in folder.iterdir()}
    assert torch.equal(torch.load(folder / "weights.pt", weights_only=True)["w"], torch.ones(1))


def test_no_file_of_a_run_is_forgotten_above(tmp_path: Path) -> None:
    result = train(small(tmp_path, frames=800, checkpoint_at_end=True))
    evaluate_run(EvaluateConfig(run=result.folder, episodes=1, epsilon=0.0, max_steps=2))
    written = {path.name for path in result.folder.iterdir()}
    assert written <= {*WRITTEN_WHOLE, *APPENDED, ".lock", "checkpoints", "tensorboard"}


@pytest.mark.parametrize("name", APPENDED)
def test_lines_are_added_to_a_plain_file_only(name: str, folder: Path, tmp_path: Path) -> None:
    """Before anything else is done: a run's record came at its very end."""
    precious = tmp_path / "precious"
    precious.write_text("frames,loss\n")
    (folder / name).symlink_to(precious)
    message = f"{folder / name} is a symbolic link but must be a file of its own; delete the link"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(resume=folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_to_append(folder / name)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for a reader
    with pytest.raises(ValueError, match=re.escape(f"{folder / name} is not a plain file but must be a file")):
        train(resume=folder)
    with pytest.raises(ValueError, match="is not a plain file"):
        open_to_append(folder / name)
    assert precious.read_text() == "frames,loss\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", name])


def test_an_evaluation_adds_to_a_plain_file_only(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (folder / "records.jsonl").symlink_to(precious)
    with pytest.raises(ValueError, match=r"records\.jsonl is a symbolic link but must be a file of its own"):
        evaluate_run(EvaluateConfig(run=folder))
    assert precious.read_text() == "kept"


@pytest.mark.parametrize(
    "name", ["checkpoints", "checkpoints/rows", "checkpoints/rows/shard-0", "tensorboard", "wandb"]
)
def test_a_folder_of_a_run_is_no_link(name: str, folder: Path, tmp_path: Path) -> None:
    """Frames that no checkpoint uses are deleted: behind a link those were another's files."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("kept")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(other)
    message = f"{folder / name} is a symbolic link but must be a folder of its own; delete the link"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(resume=folder)
    if name.startswith("checkpoints"):
        for write in (lambda: CheckpointFolder(folder).remove_unused_rows([0], {}), lambda: make(folder)):
            with pytest.raises(ValueError, match=re.escape(message)):
                write()
    assert [path.name for path in other.iterdir()] == ["precious"]


def make(folder: Path) -> None:
    CheckpointFolder(folder).make_shard_folder(0)


def test_a_draft_that_is_a_link_is_deleted_and_not_what_it_points_to(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("kept")
    checkpoints = CheckpointFolder(folder)
    checkpoints.root.mkdir()
    checkpoints.draft(1).symlink_to(other)
    checkpoints.folder(1).symlink_to(other)
    checkpoints.remove_drafts()
    assert checkpoints.rotate(0) == []
    assert list(checkpoints.root.iterdir()) == []
    assert (other / "precious").read_text() == "kept"
