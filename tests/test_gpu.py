"""What needs a GPU: stacked stages and messages on CUDA tensors, and the main job with ``--device cuda``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpdqn.launch import launch
from mpdqn.mesh import World
from mpdqn.records import RECORDS, read_records
from mpdqn.schedule import SCHEDULES
from tests.comparator import errors, violations
from tests.transparency import Case, run_case, run_reference, tiny_case

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

CASES = (
    Case(m=4),
    Case(pipeline=2, schedule="gpipe", m=4, placement="stacked"),
    Case(pipeline=3, schedule="1f1b", m=4, placement="stacked"),
    Case(pipeline=2, schedule="1f1b", m=4, placement="stacked", memory_format="channels_last"),
    Case(family="impala", pipeline=2, schedule="1f1b", m=8, placement="stacked", head="dueling"),
    Case(family="resnet18", pipeline=2, schedule="1f1b", m=2, placement="stacked"),
    Case(data=2, m=2),
    Case(data=2, pipeline=2, schedule="1f1b", m=2, placement="stacked"),
    *(tiny_case(schedule, lookahead=1, placement="stacked") for schedule in SCHEDULES),
    *(
        tiny_case("td1f1b", lookahead=1, placement="stacked", agent=agent)
        for agent in ("rainbow", "munchausen_dqn", "hl_gauss", "decqn")
    ),
    tiny_case("tdzb", pipeline=3, lookahead=1, recompute="mixed", placement="stacked"),
    tiny_case("zbv", recompute="all", accumulation=2, placement="stacked"),
    tiny_case("td1f1b", data=2, lookahead=1, accumulation=2, target_tau=0.5, placement="stacked"),
)


def on_the_gpu(cases: list[Case]) -> dict[Case, dict[str, float]]:
    """On rank 0: the errors of each case against the single process on the same device."""
    found = {}
    with World.open("cuda", 60) as world:
        for case in cases:
            reference = run_reference(world, case)
            found[case] = errors(world, case, run_case(world, case), reference)
    return found


@pytest.fixture(scope="module")
def gpu() -> dict[Case, dict[str, float]]:
    found = {}
    for ranks in (1, 2):
        cases = [case for case in CASES if case.ranks == ranks]
        found |= launch(on_the_gpu, cases, num_workers=ranks)[0]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_computes_what_the_single_process_computes(case: Case, gpu: dict[Case, dict[str, float]]) -> None:
    assert dataclasses.asdict(case)["dtype"] == "float64"
    assert violations(case, gpu[case]) == []


MPDQN_TRAIN = [sys.executable, "-m", "mpdqn", "train", "--env", "minatar-breakout", "--smoke", "--frames", "1200"]


@pytest.mark.timeout(600)
def test_the_main_job_on_the_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mpdqn",
            "compare",
            "--smoke",
            "--device",
            "cuda",
            "--compile",
            "off",
            "--out",
            str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    records = list(read_records(folder / RECORDS))
    devices = torch.cuda.device_count()
    assert {record.settings["device"] for record in records} == {"cuda"}
    assert {record.settings["backend"] for record in records} == {"gloo" if devices == 1 else "nccl"}
    assert {record.row for record in records if record.settings["stacked"]} == {
        *({f"pp2-{name}+stacked/m2" for name in ("gpipe", "1f1b", "td1f1b")} if devices == 1 else ()),
        *({"dp2xpp2-1f1b+stacked/m2"} if devices < 4 else ()),
    }
    assert all(record.values["gradient_error"] < 5e-5 for record in records)  # type: ignore[operator]
    assert torch.cuda.get_device_name() in (folder / "table.md").read_text()


@pytest.mark.timeout(600)
def test_layouts_are_timed_as_train_would_run_them_and_checked_in_float32(tmp_path: Path) -> None:
    flags = ["--precision", "bf16", "--compile", "on", "--rounds", "1", "--layouts", "single@1", "pp2-1f1b+stacked/m2"]
    done = subprocess.run(
        [sys.executable, "-m", "mpdqn", "compare", "--smoke", "--device", "cuda", "--out", str(tmp_path), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    records = list(read_records(folder / RECORDS))
    assert {record.settings["precision"] for record in records} == {"bf16, compiled"}
    assert all(record.values["gradient_error"] < 5e-5 for record in records)  # type: ignore[operator]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "flags",
    [
        ["--layout", "single@1"],
        ["--layout", "pp2-1f1b+stacked/m2", "--precision", "bf16", "--compile", "off"],
        ["--layout", "single@1", "--actor-lag", "1", "--prefetch", "1", "--agent", "rainbow", "--compile", "off"],
    ],
)
def test_training_on_the_gpu(flags: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*MPDQN_TRAIN, "--device", "cuda", "--out", str(tmp_path), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert (folder / "policy.pt2").exists()
    (record,) = read_records(folder / RECORDS)
    assert record.settings["device"] == "cuda"
    assert record.settings["precision"]
