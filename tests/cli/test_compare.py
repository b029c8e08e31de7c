"""The `mpdqn` command as a user starts it: whole runs in processes of their own, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpdqn.bench import compare as module
from mpdqn.bench.trace import read_trace
from mpdqn.cli import main
from mpdqn.records import RECORDS, TABLES, TRACES, Record, read_records
from mpdqn.schedule import SCHEDULES, ActionTable
from mpdqn.timeline import Timeline
from tests.processes import (
    END_S,
    MPDQN,
    RUN_S,
    assert_nothing_left,
    end,
    processes_of,
    run,
    run_folder,
    start,
    torchrun,
    wait_for,
    workers_of,
)

pytestmark = [pytest.mark.pool, pytest.mark.timeout(600)]

FILES = {
    "environment.json",
    "profile.json",
    "records.jsonl",
    "table.md",
    "table.tex",
    "throughput.png",
    "throughput.svg",
}

NETWORK = """
from torch import nn

class Frames(nn.Module):
    def forward(self, x):
        return x.float() / 255

def make_network(shape, actions):
    return nn.Sequential(
        Frames(), nn.Conv2d(shape[0], 8, 8, 4), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 4, 2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(8 * 81, 64), nn.ReLU(inplace=True), nn.Linear(64, actions),
    )
"""


def rows(folder: Path) -> dict[str, list[Record]]:
    by_row: dict[str, list[Record]] = {}
    for record in read_records(folder / RECORDS):
        by_row.setdefault(record.row, []).append(record)
    return by_row


def check_run(folder: Path, expected: list[str], rounds: int, traced: bool = False) -> None:
    """All files, all rows, in interleaved rounds, each exact."""
    assert {path.name for path in folder.iterdir()} == FILES | {TABLES} | ({TRACES} if traced else set())
    records = list(read_records(folder / RECORDS))
    assert [(r.round, r.row) for r in records] == [(i, name) for i in range(rounds) for name in expected]
    for record in records:
        values = record.values
        assert isinstance(values["gradient_error"], float)
        assert values["gradient_error"] < 5e-5, record.row
        assert isinstance(values["td_error_error"], float)
        assert values["td_error_error"] < 5e-5, record.row
        assert isinstance(values["transitions_per_s"], float)
        assert values["transitions_per_s"] > 0
        ranks = record.settings["ranks"]
        for key in ("compute_s", "exchange_s", "bytes_sent", "peak_memory_bytes"):
            assert len(values[key]) == ranks  # type: ignore[arg-type]
        assert min(values["peak_memory_bytes"]) > 2**27  # type: ignore[type-var, arg-type]
    table = (folder / "table.md").read_text()
    for name in expected:
        assert f"| {name} " in table
    assert "Verdict: " in table
    about = json.loads((folder / "environment.json").read_text())
    assert about["environment"]["versions"]["torch"]
    assert json.loads((folder / "profile.json").read_text())["layers"]
    tables = [ActionTable.from_csv(path.read_text()) for path in (folder / TABLES).iterdir()]
    assert len(tables) == len(expected), "the table that each row ran"
    assert b"<svg" in (folder / "throughput.svg").read_bytes()
    assert (folder / "throughput.png").read_bytes().startswith(b"\x89PNG")


def default_rows(m: int = 2) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    everything = [f"single@{cores}", f"single@{cores}/m{m}"] if cores > 1 else []
    pipelines = [f"pp2-{schedule}/m{m}" for schedule in ("gpipe", "1f1b", "td1f1b")]
    return ["single@1", f"single@1/m{m}", *everything, "dp2", *pipelines, f"dp2xpp2-1f1b/m{m}"]


# Whole runs


def test_compare(tmp_path: Path) -> None:
    """The defaults, made small."""
    done = run([*MPDQN, "compare", "--smoke", "--out", "results"], tmp_path, anew=True)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path / "results")
    check_run(folder, default_rows(), rounds=2)
    assert "transitions/s" in done.stderr, "a progress bar while collecting"
    assert "trials: 100%" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    for words in (
        "collected 256 transitions",
        "Layer costs of nature",
        "stage (of 2)",
        "Layouts compared",
        "Written to",
    ):
        assert words in done.stdout
    by_row = rows(folder)
    cores = len(os.sched_getaffinity(0))
    assert by_row["dp2xpp2-1f1b/m2"][0].settings["oversubscribed"] is (cores < 4)
    assert by_row["single@1"][0].values["bytes_sent"] == [0]
    for record in by_row["pp2-1f1b/m2"]:
        assert record.settings["boundaries"] == by_row["pp2-gpipe/m2"][0].settings["boundaries"]
        assert all(sent > 0 for sent in record.values["bytes_sent"])  # type: ignore[union-attr]
    about = json.loads((folder / "environment.json").read_text())
    assert about["environment"]["command"].endswith("compare --smoke --out results")


def actions(timeline: Timeline) -> set[tuple[int, int, str, int, int]]:
    return {(s.step, s.rank, s.kind, s.stage, s.microbatch) for s in timeline.spans if len(s.kind) == 1}


def test_every_schedule_traced_and_drawn_again(tmp_path: Path) -> None:
    """One row of each, whose stages run again; then the same files from records and traces alone."""
    names = ["single@1", *(f"pp2-{schedule}/m2" for schedule in SCHEDULES)]
    flags = ["--rounds", "1", "--transitions", "64", "--recompute", "all", "--trace", "--out", "results"]
    done = run([*MPDQN, "compare", "--smoke", *flags, "--layouts", *names], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path / "results")
    check_run(folder, names, rounds=1, traced=True)
    traced = {re.sub(r"[@/]", "_", name): name for name in names}
    wanted = {f"{stem}.{end}" for stem in traced for end in ("json", "svg", "png")}
    assert {path.name for path in (folder / TRACES).iterdir()} == wanted
    by_row = rows(folder)
    for stem, name in traced.items():
        (record,) = by_row[name]
        about = record.settings
        assert (about["lookahead"], about["recompute"]) == (1, "all")
        assert about["virtual"] == SCHEDULES[str(about["schedule"])].virtual
        trace = read_trace((folder / TRACES / f"{stem}.json").read_text())
        assert list(trace) == ["measured", "simulated"]
        done_actions = actions(trace["measured"])
        assert done_actions == actions(trace["simulated"]), "what was done is what was simulated"
        assert {kind for _, _, kind, _, _ in done_actions} >= set("FRTD")
        assert {(step, rank) for step, rank, *_ in done_actions} == {
            (step, rank) for step in (0, 1) for rank in range(int(str(about["ranks"])))
        }
        bubbles = [record.values[key] for key in ("bubble_measured", "bubble_simulated")]
        assert all(0 <= b < 1 for b in bubbles) if name != "single@1" else bubbles == [0, 0]  # type: ignore[operator]

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}

    drawn = files()
    (folder / "profile.json").unlink()
    for name in drawn:
        if name.endswith((".md", ".tex", ".svg", ".png")):
            (folder / name).unlink()
    finished = run([*MPDQN, "compare", "--render-only", str(folder)], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert files() == {name: data for name, data in drawn.items() if name != "profile.json"}
    assert "Layouts compared" in finished.stdout


def test_under_torchrun_with_four_processes(tmp_path: Path) -> None:
    names = ["single@1", "pp2-td1f1b/m2", "dp2xpp2-1f1b/m2"]
    flags = ["--smoke", "--rounds", "1", "--transitions", "64", "--layouts", *names, "--out", "results"]
    done = run([*torchrun(4), "compare", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    check_run(run_folder(tmp_path / "results"), names, rounds=1)
    assert done.stdout.count("Layouts compared") == 1, "rank 0 speaks for all"


def test_under_torchrun_with_two_processes_and_a_network_in_a_file(tmp_path: Path) -> None:
    """No hybrid: it needs four. The network's ReLUs write in place, wherever it is cut."""
    (tmp_path / "my_file.py").write_text(NETWORK)
    flags = ["--smoke", "--rounds", "1", "--transitions", "64", "--out", "results"]
    done = run([*torchrun(2), "compare", "--network", f"{tmp_path}/my_file.py:make_network", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path / "results")
    check_run(folder, default_rows()[:-1], rounds=1)
    assert rows(folder)["dp2"][0].settings["network"] == "my_file.py:make_network"
    assert folder.name.endswith("-my_file.py_make_network")
    assert tmp_path.name not in folder.name
    for path in (each for each in folder.rglob("*") if each.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} says where the network lay"


SCRIPT = """\
import mpdqn
from torch import nn

class Frames(nn.Module):
    def forward(self, x):
        return x.float() / 255

def make_network(shape, actions):
    return nn.Sequential(Frames(), nn.Conv2d(shape[0], 8, 8, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(actions))

layouts = ["single@1", "pp2-1f1b+stacked/m2", "2*single@1", "pp2-1f1b/m2"]
comparison = mpdqn.compare(network=make_network, layouts=layouts, smoke=True, transitions=64)
print(comparison.table.markdown())
print([record.row for record in comparison.records], comparison.verdict, comparison.folder)
"""


def test_a_script_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Under 20 lines and without a guard for __main__, though the workers are processes of their own."""
    assert len(SCRIPT.splitlines()) < 20
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run([sys.executable, "-W", "error", "script.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["single@1", "pp2-1f1b+stacked/m2", "2*single@1", "pp2-1f1b/m2"]
    folder = run_folder(tmp_path / "results" / "compare")
    check_run(folder, names, rounds=2)
    assert str(folder.relative_to(tmp_path)) in done.stdout
    by_row = rows(folder)
    for name in names[:3]:
        assert {sent for record in by_row[name] for sent in record.values["bytes_sent"]} == {0}  # type: ignore[union-attr]
    assert by_row["2*single@1"][0].settings["ranks"] == 2
    assert by_row["pp2-1f1b+stacked/m2"][0].settings["ranks"] == 1
    assert by_row["single@1"][0].settings["network"] == "make_network"


# A run that ends early

LONG = ["--env", "minatar-breakout", "--network", "minatar", "--smoke", "--rounds", "10000", "--transitions", "64"]
LONG += ["--layouts", "single@1", "dp2", "--out", "results"]


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A comparison in its rounds, which would go on for minutes."""
    process = start([*MPDQN, "compare", *LONG], tmp_path)
    try:
        wait_for(
            lambda: list(tmp_path.glob(f"results/*/{RECORDS}")) or process.poll() is not None, RUN_S, "first record"
        )
        yield process
    finally:
        end(process)


def test_a_killed_worker_ends_the_run(long_run: subprocess.Popen[str], tmp_path: Path) -> None:
    workers = workers_of(tmp_path)
    assert workers.keys() == {0, 1}, long_run.communicate() if long_run.poll() is not None else workers
    os.kill(workers[1], signal.SIGKILL)
    begin = time.monotonic()
    _, err = long_run.communicate(timeout=2 * END_S)
    assert time.monotonic() - begin < END_S
    assert long_run.returncode == 2, err
    assert err.rstrip().splitlines()[-1] == "mpdqn compare: rank 1 of 2 failed: killed by SIGKILL"
    assert_nothing_left(tmp_path)


def test_a_killed_worker_ends_the_run_under_torchrun(tmp_path: Path) -> None:
    process = start([*torchrun(2), "compare", *LONG], tmp_path)
    try:
        wait_for(lambda: list(tmp_path.glob(f"results/*/{RECORDS}")) or process.poll() is not None, RUN_S, "records")
        ranks = {
            pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            for pid, line in processes_of(tmp_path).items()
            if "-m mpdqn" in line and "torch.distributed.run" not in line
        }
        (victim,) = (pid for pid, environ in ranks.items() if b"RANK=1" in environ)
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        _, err = process.communicate(timeout=2 * END_S)
        assert time.monotonic() - begin < END_S
        assert process.returncode not in (0, None)
        assert "SIGKILL" in err or "Signal 9" in err, err
        assert_nothing_left(tmp_path, torchrun=True)
    finally:
        end(process)


def test_ctrl_c_ends_the_run(long_run: subprocess.Popen[str], tmp_path: Path) -> None:
    os.killpg(long_run.pid, signal.SIGINT)  # as a terminal sends it: to all
    begin = time.monotonic()
    _, err = long_run.communicate(timeout=2 * END_S)
    assert time.monotonic() - begin < END_S
    assert long_run.returncode == 130, err
    assert err.rstrip().splitlines()[-1] == "mpdqn compare: interrupted"
    assert "Traceback" not in err
    assert_nothing_left(tmp_path)


# Bad input


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(module, "launch", never)


@pytest.mark.usefixtures("no_worker")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--network", "resnet19"], "did you mean 'resnet18'?"),
        (["--env", "breakot"], "try 'breakout'"),
        (["--layouts", "pp99"], "wants p·v = 99 stages but nature has 11 layers"),
        (["--layouts", "pp2-looped_bfs+v9"], "wants p·v = 18 stages but nature has 11 layers"),
        (["--layouts", "pp2-zbv+v3"], "zbv has exactly 2 stages on each rank, not 3"),
        (["--layouts", "pp2-td1f1"], "unknown schedule 'td1f1'; did you mean 'td1f1b'?"),
        (["--recompute", "auto", "--memory-limit", "0.001"], "take at least 32.2 MiB but its memory limit is 1.0 MiB"),
        (["--memory-limit", "1"], "memory_limit 1.0 has no effect with recompute none; use --recompute auto"),
        (["--batch-size", "510", "--layouts", "dp2/m16"], "510 is not a multiple of d·m = 2·16; try 512"),
        (["--layouts", "dp3", "--batch-size", "24"], "4 virtual shards cannot be dealt to d = 3 replicas"),
        (["--network", "no_such_file.py:make_network"], "there is no file no_such_file.py"),
        (["--out", "/proc/self/results"], "--out /proc/self/results cannot be written"),
        (["--render-only", "no_such_folder"], "no_such_folder has no records"),
    ],
)
def test_bad_input_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], words: str) -> None:
    assert main(["compare", "--smoke", "--out", str(tmp_path), *flags]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("mpdqn compare: ")
    assert words in line
    assert out == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--network", "resnet19"], "mpdqn compare: no network is called 'resnet19', did you mean 'resnet18'?"),
        (["--network", "broken.py:make_network"], "mpdqn compare: broken.py does not import: ModuleNotFoundError"),
    ],
)
def test_bad_input_of_a_real_command(tmp_path: Path, flags: list[str], words: str) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module")
    done = run([*MPDQN, "compare", *flags], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(words)
    assert list(tmp_path.iterdir()) == [tmp_path / "broken.py"]


def test_another_number_of_processes_than_ranks(tmp_path: Path) -> None:
    """Every rank says the same before it meets the others, so that none waits for one that left."""
    done = run([*torchrun(2), "compare", "--layouts", "dp2xpp2"], tmp_path)
    assert done.returncode != 0
    line = (
        "mpdqn compare: the layouts need d·p = 4 ranks but 2 processes were started; "
        "use --nproc-per-node 4 or other --layouts\n"
    )
    assert line in done.stderr
    assert done.stdout == ""


def test_a_memory_limit_that_only_the_measured_layers_show_to_be_too_low(tmp_path: Path) -> None:
    """The parameters fit, their activations do not. All workers find that; one line says it, and nothing is left."""
    flags = ["--smoke", "--transitions", "64", "--layouts", "dp2", "--recompute", "auto", "--memory-limit", "0.0315"]
    done = run([*MPDQN, "compare", *flags, "--out", "results"], tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = (
        line.strip() for line in re.split(r"[\r\n]", done.stderr) if "transitions/s]" not in line and line.strip()
    )
    assert re.fullmatch(
        r"mpdqn compare: layout dp2 does not fit into 32\.3 MiB a rank, parameters included: the activations take at "
        r"least \d+\.\d MiB on lane 0 but its limit is 0\.\d MiB; use .+",
        line,
    )
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--no-such-flag", "1"],
        ["compare", "--device", "tpu"],
        ["compare", "--lookahead", "2"],
        ["compare", "--recompute", "some"],
    ],
)
def test_an_unknown_flag_or_choice(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(module, "check", None)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert arguments[1].strip("-") in err
    assert out == ""
