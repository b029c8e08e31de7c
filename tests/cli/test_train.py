"""`mpdqn train`, `evaluate` and `curves` as a user starts them: whole runs, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpdqn.dqn.published import published
from mpdqn.logs import read_progress
from mpdqn.records import RECORDS, read_records
from tests.processes import END_S, MPDQN, assert_nothing_left, end, run, run_folder, start, wait_for, workers_of

pytestmark = [pytest.mark.pool, pytest.mark.timeout(600)]

SMALL = ["--env", "minatar-breakout", "--smoke", "--frames", "1200", "--out", "runs", "--log-every", "400"]


def test_train_then_evaluate_then_draw(tmp_path: Path) -> None:
    done = run([*MPDQN, "train", *SMALL, "--layout", "dp2", "--agent", "rainbow"], tmp_path, anew=True)
    assert done.returncode == 0, done.stderr
    assert "1.20k/1.20k" in done.stderr
    for words in ("frames/s", "updates/s", "samples/insert", "ε", "loss", "return", "evaluation"):
        assert words in done.stderr.split("\r")[-1]
    folder = run_folder(tmp_path / "runs")
    names = {path.name for path in folder.iterdir()}
    files = {
        "config.json",
        "environment.json",
        "policy.pt2",
        "progress.csv",
        "records.jsonl",
        "status.json",
        "weights.pt",
    }
    assert names == files | {"tensorboard", ".lock"}
    about = json.loads((folder / "config.json").read_text())
    assert (about["config"]["seed"], about["layout"], about["plan"]["placement"]) == (0, "dp2", [[0, 1]])
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert "train --env minatar-breakout" in environment["command"]
    rows = read_progress(folder)
    assert [row["frames"] for row in rows] == [400, 800, 1200]
    assert rows[-1]["updates"] == (1_200 - 256) // 4
    assert rows[-1]["samples_per_insert"] == 8
    (record,) = read_records(folder / RECORDS)
    assert record.values["updates"] == 236
    assert (record.settings["precision"], record.values["compiled_modules"]) == ("float32", 0)

    three_lines = (
        "import torch; policy = torch.export.load('policy.pt2').module(); torch.save(policy(torch.load('x')), 'y')"
    )
    frames = torch.randint(256, (5, 4, 10, 10), dtype=torch.uint8)
    torch.save(frames, folder / "x")
    plain = [sys.executable, "-c", f"import sys; sys.modules['mpdqn'] = None; {three_lines}"]
    subprocess.run(plain, cwd=folder, check=True, timeout=300)
    from mpdqn.train import load_run

    network = load_run(folder).network
    values = torch.load(folder / "y")
    agent = published("rainbow").agent
    torch.testing.assert_close(values, agent.action_values(network(frames)), rtol=1e-5, atol=1e-6)
    assert torch.equal(values.argmax(dim=-1), agent.greedy(network(frames)))
    assert torch.load(folder / "weights.pt", weights_only=True).keys() == network.state_dict().keys()

    done = run([*MPDQN, "evaluate", "--run", str(folder), "--episodes", "3", "--video", "v.mp4"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| minatar-breakout |" in done.stdout
    assert (tmp_path / "v.mp4").stat().st_size > 500
    assert len(list(read_records(folder / RECORDS))) == 3
    done = run([*MPDQN, "curves", "--runs", str(folder), "--out", "c"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """An acting rank, of which the learner hears only through its transitions. The line that says why is the last."""
    long = ["--env", "minatar-breakout", "--frames", "100000000", "--min-replay", "256", "--capacity", "2000"]
    long += ["--log-every", "400"]
    process = start([*MPDQN, "train", *long, "--actors", "workers", "--layout", "single@1", "--out", "runs"], tmp_path)
    try:
        wait_for(lambda: list((tmp_path / "runs").glob("*/progress.csv")), 120, "row of progress")
        workers = workers_of(tmp_path)
        assert workers.keys() == {0, 1}
        os.kill(workers[1], signal.SIGKILL)
        _, err = process.communicate(timeout=END_S)
    finally:
        end(process)
    assert process.returncode == 2
    assert err.splitlines()[-1] == "mpdqn train: rank 1 of 2 failed: killed by SIGKILL"
    assert "leaked semaphore" not in err
    assert_nothing_left(tmp_path)
