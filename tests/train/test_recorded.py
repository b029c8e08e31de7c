"""What a run's folder says of the run is checked value by value: it may be somebody else's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpdqn.cli import main
from mpdqn.layouts import Layout
from mpdqn.train import load_run, train
from mpdqn.train.folder import save_weights
from mpdqn.train.resume import recorded_config
from mpdqn.train.status import RUNNING, STOPPED, describe, now

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


def test_what_a_run_writes_into_its_folder_follows_no_link(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("status.json.part", "weights.pt.part", "weights.pt"):
        (folder / name).symlink_to(precious)
    now(state=RUNNING, frames=0, total_frames=1, updates=0, layout="single@1").write(folder)
    save_weights(folder, {"w": torch.ones(1)})
    assert precious.read_text() == "kept"
    assert torch.equal(torch.load(folder / "weights.pt", weights_only=True)["w"], torch.ones(1))
