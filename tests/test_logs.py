"""Logs: progress that survives a kill and new columns, TensorBoard events, Weights & Biases offline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpdqn.logs import PROGRESS, open_logs, read_progress

NAN = float("nan")


def scalars(folder: Path) -> str:
    """In a process of its own: TensorBoard's reader warns of what numpy and protobuf deprecated."""
    code = (
        "import sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "a = EventAccumulator(sys.argv[1]); a.Reload()\n"
        "print(a.Tags()['scalars'], [(e.step, e.value) for e in a.Scalars('loss')])"
    )
    argv = [sys.executable, "-c", code, str(folder / "tensorboard")]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def test_progress_is_read_back(tmp_path: Path) -> None:
    with open_logs(tmp_path / "run", config={}) as logs:
        logs.write(4000, {"loss": 0.1, "return": NAN})
        logs.write(8000, {"loss": 1 / 3, "return": -20.5})
        assert len(read_progress(tmp_path / "run")) == 2, "flushed, not only when closed"
    assert read_progress(tmp_path / "run") == [
        {"frames": 4000.0, "loss": 0.1},
        {"frames": 8000.0, "loss": 1 / 3, "return": -20.5},
    ]


def test_a_column_may_come_later(tmp_path: Path) -> None:
    with open_logs(tmp_path, config={}) as logs:
        logs.write(4, {"loss": 1.0})
        logs.write(8, {"evaluation": 2.0})
        logs.write(12, {"loss": 3.0, "evaluation": 4.0})
    assert (tmp_path / PROGRESS).read_text() == "frames,loss,evaluation\n4,1.0,\n8,,2.0\n12,3.0,4.0\n"


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for frames, row in ((4, {"loss": 1.0}), (8, {"return": 2.0, "loss": 3.0})):
        with open_logs(tmp_path, config={}) as logs:
            logs.write(frames, row)
    assert read_progress(tmp_path) == [{"frames": 4.0, "loss": 1.0}, {"frames": 8.0, "loss": 3.0, "return": 2.0}]


def test_rows_after_the_checkpoint_come_again(tmp_path: Path) -> None:
    with open_logs(tmp_path, config={}) as logs:
        for frames in (4, 8, 12):
            logs.write(frames, {"loss": float(frames)})
    time.sleep(1.1)  # TensorBoard's files are told apart, and ordered, by the second in which they were opened
    with open_logs(tmp_path, config={}, resume_at=8) as logs:
        assert [row["frames"] for row in read_progress(tmp_path)] == [4.0, 8.0]
        logs.write(12, {"loss": 0.5})
    assert (tmp_path / PROGRESS).read_text() == "frames,loss\n4,4.0\n8,8.0\n12,0.5\n"
    assert scalars(tmp_path) == "['loss'] [(4, 4.0), (8, 8.0), (12, 0.5)]"


def test_the_half_row_of_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS
    path.write_text("frames,loss,return\n4,1.0,2.0\n8,3")
    assert read_progress(tmp_path) == [{"frames": 4.0, "loss": 1.0, "return": 2.0}]
    with open_logs(tmp_path, config={}) as logs:
        logs.write(8, {"loss": 3.0})
    assert path.read_text() == "frames,loss,return\n4,1.0,2.0\n8,3.0,\n"


def test_a_header_without_rows(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_text("fra")
    with open_logs(tmp_path, config={}) as logs:
        logs.write(8, {"loss": 3.0})
    assert read_progress(tmp_path) == [{"frames": 8.0, "loss": 3.0}]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    with open_logs(tmp_path, config={}) as logs:
        logs.write(4000, {"loss": 0.5, "return": NAN})
        logs.write(8000, {"loss": 0.25})
    assert scalars(tmp_path) == "['loss'] [(4000, 0.5), (8000, 0.25)]"


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: it starts a service, and keeps settings for the whole process."""
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from mpdqn.logs import open_logs\n"
        "with open_logs(Path(sys.argv[1]), wandb=True, config={'env': 'pong', 'lr': 1e-4}) as logs:\n"
        "    logs.write(4, {'loss': 1.0}); logs.write(8, {'loss': 2.0})"
    )
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_progress(tmp_path / "run")) == 2
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-run.wandb"))


def test_weights_and_biases_without_a_key(tmp_path: Path) -> None:
    """It was told by a traceback, after the run's folder was made."""
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "mpdqn",
        "train",
        "--env",
        "minatar-breakout",
        "--smoke",
        "--wandb",
        "--out",
        "runs",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mpdqn train: logging to Weights & Biases: ")
    assert "set WANDB_MODE=offline" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'mpdqn\[wandb\]'"):
        open_logs(tmp_path / "run", wandb=True, config={})
    assert not (tmp_path / "run").exists()


def test_frames_are_no_column_of_a_row(tmp_path: Path) -> None:
    with open_logs(tmp_path, config={}) as logs, pytest.raises(ValueError, match="first argument"):
        logs.write(4, {"frames": 8.0})


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give the folder of a training run"):
        read_progress(tmp_path)
    (tmp_path / PROGRESS).write_text("frames,loss\n4,x\n")
    with pytest.raises(ValueError, match=r"line 2: could not convert string to float"):
        read_progress(tmp_path)
