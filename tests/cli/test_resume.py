"""`mpdqn train --resume` and `mpdqn status` as a user has them: SIGTERM, a second run in one folder, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.train.stop import EXIT_RESUMABLE
from tests.processes import (
    END_S,
    MPDQN,
    assert_nothing_left,
    end,
    forked,
    run,
    run_folder,
    start,
    torchrun,
    wait_for,
    workers_of,
)

pytestmark = [pytest.mark.pool, pytest.mark.timeout(600)]

LONG = ["--env", "minatar-breakout", "--frames", "100000000", "--min-replay", "256", "--capacity", "2000"]
LONG += ["--log-every", "400", "--out", "runs"]


def state_of(folder: Path) -> dict[str, object]:
    status: dict[str, object] = json.loads((folder / "status.json").read_text())
    return status


def begun(tmp_path: Path, frames: int = 400) -> bool:
    """Whether the run has learned for a while."""
    found = list((tmp_path / "runs").glob("*/status.json"))
    return bool(found) and int(str(state_of(found[0].parent)["frames"])) >= frames


def stopped(process: subprocess.Popen[str], to: int) -> tuple[int, str, str]:
    """SIGTERM to process ``to``; how ``process`` ended."""
    os.kill(to, signal.SIGTERM)
    out, err = process.communicate(timeout=END_S)
    return process.returncode, out, err


def test_sigterm_writes_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    process = start([*MPDQN, "train", *LONG, "--layout", "dp2"], tmp_path)
    try:
        wait_for(lambda: begun(tmp_path), 120, "row of progress")
        folder = run_folder(tmp_path / "runs")
        told = forked([*MPDQN, "status", str(folder)], tmp_path)
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith("state        running\n")
        second = forked([*MPDQN, "train", "--resume", str(folder)], tmp_path)
        assert second.returncode == 2
        assert f"{folder} is being trained by process" in second.stderr
        assert process.poll() is None
        code, out, err = stopped(process, process.pid)
    finally:
        end(process)
    assert code == EXIT_RESUMABLE, err
    assert f"Go on: mpdqn train --resume {folder.relative_to(tmp_path)}" in out
    assert_nothing_left(tmp_path)
    before = state_of(folder)
    (manifest,) = CheckpointFolder(folder).manifests()
    assert before["state"] == "stopped"
    assert before["frames"] == manifest.frames >= 400

    # On one process, whose own SIGTERM it is now.
    process = start([*MPDQN, "train", "--resume", str(folder), "--layout", "single@1"], tmp_path)
    try:
        wait_for(lambda: begun(tmp_path, manifest.frames + 800), 120, "row of progress")
        code, out, err = stopped(process, process.pid)
    finally:
        end(process)
    assert code == EXIT_RESUMABLE, err
    after = state_of(folder)
    assert (after["state"], after["resumed"], after["layout"]) == ("stopped", 1, "single@1")
    assert [m.layout for m in CheckpointFolder(folder).manifests()] == ["single@1", "dp2"]
    told = run([*MPDQN, "status", str(folder)], tmp_path)
    assert told.stdout.startswith("state        stopped\n")
    assert f"Go on with it: mpdqn train --resume {folder}" in told.stdout


@pytest.mark.parametrize("whom", ["torchrun", "a worker"])
def test_sigterm_reaches_all_ranks_from_wherever_it_comes(whom: str, tmp_path: Path) -> None:
    """From torchrun, which sends it to its workers; from a scheduler, which sends it to any process of the job."""
    command = [*torchrun(2), "train", *LONG, "--layout", "dp2"]
    process = start(command if whom == "torchrun" else [*MPDQN, *command[command.index("train") :]], tmp_path)
    try:
        wait_for(lambda: begun(tmp_path), 120, "row of progress")
        code, _, err = stopped(process, process.pid if whom == "torchrun" else workers_of(tmp_path)[0])
    finally:
        end(process)
    assert code == EXIT_RESUMABLE if whom == "a worker" else code != 0, err
    assert_nothing_left(tmp_path, torchrun=whom == "torchrun")
    folder = run_folder(tmp_path / "runs")
    assert state_of(folder)["state"] == "stopped"
    assert len(CheckpointFolder(folder).manifests()) == 1
