"""Other people's pipelines: the real main made small, and what must hold before their speeds are compared."""

import functools
import importlib.util
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments.peers.contenders import YARDSTICK, check_losses
from experiments.peers.peers_table import failure, failures, peers_table
from experiments.peers.task import Step
from experiments.peers.team import Team, TeamFailed
from mpdqn.records import RECORDS, Environment, Record, append_records, read_records
from tests.experiments.running import run

ROOT = Path(__file__).parents[2]
OPTIONAL = {"DeepSpeed PipelineModule": "deepspeed", "torchgpipe": "torchgpipe"}
ALWAYS = [
    "one process",
    "torch DistributedDataParallel",
    "torch ScheduleGPipe",
    "torch Schedule1F1B",
    "mpdqn single@all",
    "mpdqn dp2",
    "mpdqn pp2-1f1b/m8",
    "mpdqn pp2-td1f1b/m8",
]


def counting(fails_at: int = -1) -> Step:
    dist.init_process_group("gloo")
    rank, calls = dist.get_rank(), 0

    def step() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == fails_at:
            raise ValueError("the first line\nand more")
        total = torch.ones(1)
        dist.all_reduce(total)
        return total[0] * calls / 2  # a half of the loss, on each of two ranks

    return step


def turn(contender: str, round_: int, rate: float) -> Record:
    return Record(
        experiment="pipeline_peers",
        row=contender,
        round=round_,
        seed=0,
        settings={
            "workload": "resnet18, batch 64",
            "contender": contender,
            "contenders": "one process; other",
            "ranks": [1, 2],
            "threads": [2, 1],
            "m": [1, 8],
            "batch_size": 64,
            "cut": 10,
            "peers": "no deepspeed",
        },
        values={"calls_per_s": rate},
        environment=Environment.current(),
    )


@pytest.mark.pool
@pytest.mark.timeout(600)
def test_every_installed_peer_makes_the_same_update(tmp_path: Path) -> None:
    output = run("pipeline_peers", "--out", str(tmp_path))
    table = (tmp_path / "table.md").read_text()
    assert table in output
    assert "could not run" not in table
    absent = {name for name, package in OPTIONAL.items() if importlib.util.find_spec(package) is None}
    for name in absent:
        assert f"{name} is left out: {OPTIONAL[name]} is not installed; pip install -e " in output
    measured = [record.settings["contender"] for record in read_records(tmp_path / RECORDS)]
    assert sorted(map(str, measured)) == sorted([*ALWAYS, *(OPTIONAL.keys() - absent)])
    for name in map(str, measured):
        assert f"| {name} " in table


def test_losses_that_differ_stop_the_run() -> None:
    check_losses({YARDSTICK: [0.5, 0.4], "other": [0.5, 0.40005]})
    with pytest.raises(ValueError, match=r"other has loss 0\.400200 in update 2, but one process has 0\.400000"):
        check_losses({YARDSTICK: [0.5, 0.4], "other": [0.5, 0.4002]})


@pytest.mark.pool
def test_a_team_adds_up_its_losses_and_rests_between_turns() -> None:
    team = Team(counting, ranks=2, threads=1)
    try:
        assert team.updates(3)[1] == [2.0, 4.0, 6.0]
        time.sleep(0.1)
        for process in team._processes:
            assert Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "stopped"
        assert team.rate(0.0) > 0
        assert team.updates(1)[1] == [2 * 7.0], "three, one to warm up, two measured, and this one"
    finally:
        team.close()
    assert not any(process.is_alive() for process in team._processes)


@pytest.mark.pool
def test_the_rank_that_failed_says_why_and_its_team_ends() -> None:
    team = Team(functools.partial(counting, 2), ranks=2, threads=1)
    with pytest.raises(TeamFailed) as failed:
        team.updates(3)
    assert str(failed.value) == "ValueError: the first line"
    assert "On rank 1:" in failed.value.__notes__[0]
    assert not any(process.is_alive() for process in team._processes)


def test_the_table_keeps_rows_that_lose_and_says_what_could_not_run(tmp_path: Path) -> None:
    path, workload = tmp_path / RECORDS, "resnet18, batch 64"
    append_records(path, [failure("DeepSpeed", "ImportError: no", workload=workload, seed=0, settings={})])
    append_records(path, [failure("elsewhere", "ImportError", workload="nature, batch 16", seed=0, settings={})])
    rates = {"one process": (1.0, 2.0, 1.0), "other": (0.5, 0.5, 0.75)}
    turns = [turn(name, r, rate) for name, of in rates.items() for r, rate in enumerate(of)]
    text = peers_table([*turns, *failures(path, workload)]).markdown()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| other")]
    assert cells == [
        ["", "other", "2 × 1", "8", "0.50 [0.50–0.75]", "32.0 [32.0–48.0]", "0.50 [0.25–0.75]×", ""],
    ]
    assert "DeepSpeed could not run: ImportError: no" in text
    assert "elsewhere" not in text
    with pytest.raises(ValueError, match="there are no turns among 1 records"):
        peers_table(failures(path, workload))
