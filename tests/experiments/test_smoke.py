"""Each experiment's real main runs, made small."""

from pathlib import Path

import pytest

from mpdqn.records import RECORDS, read_records
from tests.experiments.running import run

pytestmark = pytest.mark.pool

ROOT = Path(__file__).parents[2]


def test_every_experiment_is_run_here() -> None:
    files = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    measured = {
        "checkpoint_cost",
        "emulated_pipeline",
        "gpipe",
        "kill_drill",
        "learner_speed",
        "pipeline_efficiency",
        "pipeline_peers",
        "rank_startup",
        "replay",
        "schedule_overhead",
        "training_speed",
    }
    assert files == measured, "give a new experiment its test"


def test_learner_speed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    table = run("learner_speed", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    records = list(read_records(tmp_path / RECORDS))
    names = ["mpdqn", "plain torch", "TorchRL DQNLoss", "plain torch, tuned", "TorchRL DQNLoss, tuned"]
    assert [record.settings["contender"] for record in records] == names
    assert run("learner_speed", "--out", str(tmp_path)) == table, "all is there: nothing is measured again"
    assert list(read_records(tmp_path / RECORDS)) == records


def test_checkpoint_cost(tmp_path: Path) -> None:
    table = run("checkpoint_cost", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    records = list(read_records(tmp_path / RECORDS))
    assert len(records) == 8, "every turn of a round"
    for words in ("steps while it is written, × quiet", "loading, s", "of it frames, MB", "bar "):
        assert words in table
    assert run("checkpoint_cost", "--out", str(tmp_path)) == table, "all is there: nothing is measured again"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "the checkpoints are deleted"


@pytest.mark.timeout(900)
def test_kill_drill(tmp_path: Path) -> None:
    """The small kill drill: a run that is killed twice at random moments ends as the one that was left alone."""
    table = run("kill_drill", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    records = list(read_records(tmp_path / RECORDS))
    assert [record.settings["what"] for record in records] == ["kill", "kill", "end"]
    assert records[-1].values["verdict"] == "identical"
    first, second = (record.values["fraction"] for record in records[:2])
    assert 0 < first < 0.475 <= second < 1, "one kill in each half"  # type: ignore[operator]
    assert run("kill_drill", "--out", str(tmp_path)) == table


@pytest.mark.timeout(600)
def test_training_speed(tmp_path: Path) -> None:
    """Every peer that is installed trains; the others are named in the notes."""
    table = run("training_speed", "--out", str(tmp_path))  # eleven processes, one after the other
    assert (tmp_path / "table.md").read_text() in table
    records = list(read_records(tmp_path / RECORDS))
    measured = {(record.settings["workload"], record.settings["contender"]) for record in records}
    assert {
        ("training", "mpdqn"),
        ("training", "mpdqn, defaults"),
        ("collection with a policy", "mpdqn"),
        ("collection with a policy", "mpdqn, defaults"),
        ("collection with a policy", "bare loop"),
    } <= (measured)
    for name in ("TorchRL dqn_atari", "SB3 DQN", "CleanRL dqn_atari", "SB3 DQN, tuned", "CleanRL dqn_atari, tuned"):
        assert ("training", name) in measured or f"{name} left out: " in table
    assert all(record.values["calls_per_s"] > 0 for record in records)  # type: ignore[operator]
    assert "mpdqn's collection over the bare loop" in table


@pytest.mark.timeout(600)
def test_pipeline_efficiency(tmp_path: Path) -> None:
    output = run("pipeline_efficiency", "--rounds", "1", "--transitions", "64", "--out", str(tmp_path))
    (folder,) = tmp_path.iterdir()
    table = (folder / "efficiency.md").read_text()
    assert table in output
    records = list(read_records(folder / RECORDS))
    assert [record.row for record in records] == [
        *("2*single@1/m8", "single@1/m8", "pp2-gpipe/m8", "pp2-1f1b/m8", "pp2-td1f1b/m8", "pp2-tdzb/m8")
    ]
    for record in records:
        assert f"| {record.row} " in table
        assert record.values["gradient_error"] < 5e-5  # type: ignore[operator]


@pytest.mark.timeout(600)
def test_replay_goes_on_where_it_stopped(tmp_path: Path) -> None:
    output = run("replay", "--out", str(tmp_path))
    table = (tmp_path / "table.md").read_text()
    assert table in output
    records = list(read_records(tmp_path / RECORDS))
    assert {record.settings["workload"] for record in records} == {
        *("memory", "insert", "insert into new memory", "sample uniformly", "sample by priority")
    }
    bytes_of = {
        str(record.settings["contender"]): record.values["bytes_per_transition"]
        for record in records
        if record.settings["workload"] == "memory"
    }
    shipped = bytes_of["TorchRL as shipped"]
    assert isinstance(shipped, float)
    assert round(shipped * 1e6 / 2**30) == 210
    assert table in run("replay", "--out", str(tmp_path)), "all is there: nothing is measured again"
    assert list(read_records(tmp_path / RECORDS)) == records


@pytest.mark.timeout(600)
def test_rank_startup(tmp_path: Path) -> None:
    table = run("rank_startup", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    records = list(read_records(tmp_path / RECORDS))
    ways = ["spawned", "forkserver, cold", "forkserver, warm"]
    assert [record.row for record in records] == [*ways, "main job, under torchrun", "main job, in a pool"]
    for record in records[:-2]:
        assert record.values["ready_s"] > 0  # type: ignore[operator]
        memory = record.values["memory_bytes"]
        assert len(memory) == record.settings["ranks"]  # type: ignore[arg-type]
        assert min(memory) > 2**20  # type: ignore[type-var, arg-type]
        assert (record.values["server_bytes"] > 0) == (record.row != "spawned")  # type: ignore[operator]
    assert all(record.values["peak_bytes"] > 2**28 for record in records[-2:])  # type: ignore[operator]
    assert "bar " in table
    assert run("rank_startup", "--out", str(tmp_path)) == table, "all is there: nothing is measured again"
