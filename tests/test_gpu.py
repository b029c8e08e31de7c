"""What needs a GPU: stacked stages and messages on CUDA tensors, and the main job with ``--device cuda``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpdqn.bench.single import random_batch
from mpdqn.dqn.agents import make_agent
from mpdqn.launch import launch
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network, set_memory_format
from mpdqn.pipeline.acceleration import Acceleration
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.records import RECORDS, read_records
from mpdqn.schedule import SCHEDULES
from tests.comparator import errors, violations
from tests.transparency import Case, run_case, run_reference, tiny_case

ROOT = Path(__file__).parents[1]
GPU_FRAMES = (4, 44, 44)
CPU_BOUND = 1e-4
"""How far gradients of float32 may be apart when two sets of kernels compute them: twice the bound between layouts."""

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


def one_learner(
    world: World, family: str, boundaries: tuple[int, ...], schedule: str, acceleration: Acceleration, agent: str
) -> Learner:
    """A float32 learner with all stages in this process, m = 2, channels_last as in training; without TF32."""
    Acceleration().set_products()
    rules, virtual = make_agent(agent), SCHEDULES[schedule].virtual
    options = rules.head_options() | ({} if family == "resnet18" else {"fc": 64})
    network = make_network(family, GPU_FRAMES, 5, seed=3, **options)  # on the CPU, as in training
    set_memory_format(network, "channels_last")
    partition = Partition(boundaries=(*boundaries, len(network)))
    parallelism = Parallelism(
        pipeline=partition.num_stages // virtual, num_microbatches=2, schedule=schedule, virtual=virtual
    )
    return Learner(
        network,
        mesh=Mesh(world, Plan.stacked(partition, parallelism), rules.letters),
        agent=rules,
        batch_size=16,
        observation_shape=GPU_FRAMES,
        config=LearnerConfig(learning_rate=1e-30),
        acceleration=acceleration,
    )


def gradients(learner: Learner, updates: int = 1) -> dict[str, torch.Tensor]:
    """Those of the last update, on the CPU; the weights stay as they are."""
    for update in range(updates):
        learner.learn(random_batch(GPU_FRAMES, 5, 16, update).to(learner.mesh.device, torch.float32))
    return {name: p.grad.detach().cpu() for name, p in learner.named_parameters() if p.grad is not None}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
    return float((difference / sum(float(t.double().square().sum()) for t in b.values())) ** 0.5)


def bf16_resnet() -> tuple[float, float, list[tuple[Any, ...]]]:
    """Distance of a cut network to the whole one and of both to float32; what crossed the cuts, and what was agreed."""
    bf16, crossed = Acceleration(precision="bf16"), []
    with World.open("cuda", 60) as world:
        plain = gradients(one_learner(world, "resnet18", (0,), "1f1b", Acceleration(), "dqn"))
        whole = gradients(one_learner(world, "resnet18", (0,), "1f1b", bf16, "dqn"))
        cut = one_learner(world, "resnet18", (0, 6), "1f1b", bf16, "dqn")
        first, promised = cut.stages[0], cut.stages[0].example_output

        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            crossed.append((output.dtype, output.stride(), promised.dtype, promised.stride()))

        first.online.register_forward_hook(keep)
        return distance(gradients(cut), whole), distance(whole, plain), crossed


@pytest.mark.timeout(600)
def test_a_resnet_in_bf16_is_cut_where_the_gpu_computes_in_float32() -> None:
    """CUDA's autocast computes group_norm in float32, the CPU's does not. The boundaries' dtypes were found on the CPU,
    before the network moved, and every update of a pipeline ended with a ValueError."""
    cut, rounded, crossed = launch(bf16_resnet, num_workers=1)[0]
    assert len(crossed) == 2, "two micro-batches"
    for dtype, stride, promised_dtype, promised_stride in crossed:
        assert (dtype, stride) == (promised_dtype, promised_stride), "else each message pays a copy, or is refused"
    assert 1e-4 < rounded < 0.5, "bfloat16 has 8 bits"
    assert cut < 1e-2, "the same kernels on the same micro-batches; cuDNN's sums may have another order"


def compiled_split() -> dict[str, tuple[float, int]]:
    """For each schedule the distance of compiled stages to plain ones, and how many modules were compiled."""
    found = {}
    with World.open("cuda", 60) as world:
        for schedule, boundaries in (("tdzb", (0, 6)), ("zbv", (0, 3, 5, 8))):
            plain = gradients(one_learner(world, "nature", boundaries, schedule, Acceleration(), "double_dqn"), 2)
            learner = one_learner(world, "nature", boundaries, schedule, Acceleration(compiled=True), "double_dqn")
            found[schedule] = distance(gradients(learner, 2), plain), learner.compiled_modules
    return found


@pytest.mark.timeout(600)
def test_a_split_backward_runs_compiled() -> None:
    """Triton's kernels instead of cuDNN's and others: the bound is that of float32 sums in another order."""
    found = launch(compiled_split, num_workers=1)[0]
    assert {schedule: count for schedule, (_, count) in found.items()} == {"tdzb": 2 * 3, "zbv": 4 * 3}
    assert max(error for error, _ in found.values()) < CPU_BOUND


def one_update(device: str) -> dict[str, dict[str, torch.Tensor]]:
    """The gradients of one update of each network on ``device``."""
    with World.open(device, 60) as world:
        return {
            family: gradients(one_learner(world, family, (0,), "1f1b", Acceleration(), "dqn"))
            for family in ("nature", "resnet18")
        }


@pytest.mark.timeout(600)
def test_an_update_on_the_gpu_is_that_of_the_cpu() -> None:
    """In float32 without TF32, other kernels and another order of the sums are all that differs."""
    on_gpu, on_cpu = (launch(one_update, device, num_workers=1)[0] for device in ("cuda", "cpu"))
    assert {family: distance(on_gpu[family], on_cpu[family]) for family in on_cpu} == {
        family: pytest.approx(0.0, abs=CPU_BOUND) for family in ("nature", "resnet18")
    }


def copies_of_a_noisy_update() -> list[str]:
    """The names of the copies to the GPU in one update whose batch is there already."""
    with World.open("cuda", 60) as world:
        learner = one_learner(world, "nature", (0, 6), "1f1b", Acceleration(), "rainbow")
        batch = random_batch(GPU_FRAMES, 5, 16, 0).to(world.device, torch.float32)
        for _ in range(2):
            learner.learn(batch)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            learner.learn(batch)
            torch.cuda.synchronize()
    return [event.name for event in profile.events() if "Memcpy HtoD" in event.name]


@pytest.mark.timeout(600)
def test_a_noisy_update_copies_from_pinned_memory_once_for_each_network_of_a_stage() -> None:
    """The noise of each layer came from pageable memory, and the host waited for each of 16 copies."""
    copies = launch(copies_of_a_noisy_update, num_workers=1)[0]
    assert [name for name in copies if "Pageable" in name] == []
    assert len(copies) == 2, "noise of the online and of the target network: all noisy layers are in the last stage"
    assert all("Pinned" in name for name in copies)


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
        ["--layout", "pp2-zb_h1+stacked/m2", "--precision", "bf16", "--compile", "on"],
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
    assert (record.values["compiled_modules"] > 0) == ("compiled" in record.settings["precision"])
