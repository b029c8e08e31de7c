"""Bad input ends a comparison with one clear ValueError, before any worker starts."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpdqn
from mpdqn.bench import compare as module
from mpdqn.bench.config import CompareConfig, check
from mpdqn.dqn.agents import make_agent
from mpdqn.train import TrainConfig
from mpdqn.train.check import check as check_train

TUPLE = tuple[int, int, int]


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a worker was started")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a comparison that must be refused with ValueError before any worker; gives the message."""
    monkeypatch.setattr(module, "launch", never)
    monkeypatch.setattr(module, "run_trials", never)

    def run(**settings: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            mpdqn.compare(CompareConfig(**{"smoke": True, "out": tmp_path, **settings}))
        message = str(caught.value)
        assert "\n" not in message
        assert not getattr(caught.value, "__notes__", ())
        return message

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "resnet19"}, "no network is called 'resnet19', did you mean 'resnet18'?"),
        ({"env": "pomg"}, "there is no environment 'pomg'; try 'pong'"),
        ({"agent": "double-dqn"}, "unknown agent 'double-dqn'; did you mean 'double_dqn'?"),
        ({"layouts": ("pp2-gpip",)}, "unknown schedule 'gpip'; did you mean 'gpipe'?"),
        ({"layouts": ("pp2-zbv+v3",)}, "zbv has exactly 2 stages on each rank, not 3"),
        ({"layouts": ("single@1", "two")}, "'two' is no layout"),
        (
            {"layouts": ("pp12/m2",)},
            "layout pp12-gpipe/m2 wants p·v = 12 stages but nature has 11 layers in its nn.Sequential, 5 of them with "
            "parameters to train",
        ),
        ({"layouts": ("pp6/m2",)}, "wants p·v = 6 stages but nature has 11 layers"),
        (
            {"layouts": ("single@1", "pp2-looped_bfs+v9")},
            "layout pp2-looped_bfs+v9/m8 wants p·v = 18 stages but nature has 11 layers in its nn.Sequential, 5 of "
            "them with parameters to train, and every stage needs one; use at most that many stages",
        ),
        ({"layouts": ("pp3-zbv",)}, "layout pp3-zbv/m8 wants p·v = 6 stages but nature has 11 layers"),
        ({"lookahead": 2}, "lookahead is 2 but must be 0 or 1"),
        ({"recompute": "some"}, "unknown recompute 'some'; choose none, boundaries, all or auto"),
        ({"recompute": "auto", "memory_limit": -1.0}, "memory_limit is -1.0 GiB but must be at least 0"),
        ({"recompute": "auto", "memory_limit": float("nan")}, "memory_limit is nan GiB but must be at least 0"),
        ({"memory_limit": 2.0}, "memory_limit 2.0 has no effect with recompute none; use --recompute auto"),
        (
            {"recompute": "auto", "memory_limit": 0.001, "layouts": ("dp2xpp2-1f1b",)},
            "layout dp2xpp2-1f1b/m8 has a rank whose parameters, their gradients, Adam's moments and the target "
            "network take at least 16.1 MiB but its memory limit is 1.0 MiB; raise it or use more stages",
        ),
        ({"batch_size": 510, "layouts": ("dp2/m16",)}, "batch_size 510 is not a multiple of d·m = 2·16; try 512"),
        ({"batch_size": 10, "layouts": ("pp2/m4",)}, "batch_size 10 is not a multiple of d·m = 1·4; try 8"),
        ({"batch_size": 0}, "batch_size 0 is not a multiple of d·m"),
        (
            {"batch_size": 18, "layouts": ("dp3",)},
            "4 virtual shards cannot be dealt to d = 3 replicas; try --num-shards 3",
        ),
        ({"batch_size": 18, "layouts": ("dp2",)}, "batch_size 18 is not a multiple of the 4 virtual shards; try 16"),
        ({"num_shards": 0}, "0 virtual shards cannot be dealt to d = 1 replicas"),
        ({"network": "no/such.py:make"}, "there is no file no/such.py"),
        ({"num_microbatches": 0}, "num_microbatches is 0 but must be at least 1"),
        ({"steps": 0}, "steps is 0 but must be at least 1"),
        ({"rounds": -1}, "rounds is -1 but must be at least 1"),
        ({"transitions": 0}, "transitions is 0 but must be at least 1"),
        (
            {"transitions": 39, "agent": "rainbow"},
            "transitions is 39 but batch_size 16 and 8 environments with 3-step returns need at least 40",
        ),
        ({"timeout": 0.0}, "timeout is 0.0 s but must be above 0"),
        ({"epsilon": 1.5}, "epsilon is 1.5 but must be between 0 and 1"),
        ({"network": "impala", "width": 0.0}, "width"),
        ({"device": "tpu"}, "unknown device 'tpu'; choose cpu or cuda"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose float32, tf32, bf16 or auto"),
        ({"precision": "tf32"}, "precision tf32 is CUDA's, and --device is cpu; use float32 or bf16"),
        ({"compile": "yes"}, "unknown compile 'yes'; choose auto, on or off"),
        (
            {"agent": "decqn"},
            "agent decqn has a branching head but environment pong has 1 discrete action of 6 choices",
        ),
        ({"env": "minatar-breakout", "network": "nature"}, "Nature needs frames of at least 36×36 pixels"),
    ],
)
def test_bad_settings(refused: Callable[..., str], settings: dict[str, Any], message: str) -> None:
    assert message in refused(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(refused: Callable[..., str]) -> None:
    message = refused(device="cuda")
    assert message.startswith(
        f"--device cuda, but torch {torch.__version__} sees 0 CUDA devices here; use --device cpu"
    )


def test_an_out_below_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results"
    assert refused(out=out) == f"--out {out} cannot be written (Not a directory); choose another folder"


def test_an_out_where_no_file_can_be_made(refused: Callable[..., str]) -> None:
    out = Path("/proc/self/results")
    assert re.fullmatch(rf"--out {out} cannot be written \(.+\); choose another folder", refused(out=out))


FILES = {
    "broken.py": "import no_such_module",
    "late.py": "import no_such_syntax ?",
    "other.py": "def make_net(shape, actions): ...",
    "nothing.py": "def make_network(shape, actions): return None",
    "raises.py": "def make_network(shape, actions): raise RuntimeError('out of ideas')",
    "narrow.py": "from torch import nn\n"
    "def make_network(shape, actions):\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(10, actions))",
    "norm.py": "from torch import nn\n"
    "def make_network(shape, actions):\n"
    "    return nn.Sequential(nn.Conv2d(shape[0], 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(actions))",
}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("broken.py", "does not import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("late.py", "does not import: SyntaxError"),
        ("other.py", "has no function called 'make_network', did you mean 'make_net'?"),
        ("nothing.py", "returned NoneType; return a torch.nn.Module"),
        ("raises.py", "raised RuntimeError: out of ideas"),
        ("narrow.py", "cannot take frames of shape (4, 84, 84)"),
        ("norm.py", "layer '1' is a BatchNorm2d, whose statistics depend on how the batch is cut"),
    ],
)
def test_a_network_of_ones_own(refused: Callable[..., str], tmp_path: Path, file: str, message: str) -> None:
    path = tmp_path / file
    path.write_text(FILES[file])
    assert message in refused(network=f"{path}:make_network")


def test_a_frame_shape_that_the_zoo_cannot_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Atari game has such frames: one with a screen of 8 × 8 stands for the environments to come."""
    from mpdqn.bench import config
    from mpdqn.environments import EnvironmentSpec

    monkeypatch.setattr(
        config, "environment_spec", lambda name: EnvironmentSpec(name=name, observation_shape=(4, 8, 8), num_actions=6)
    )
    with pytest.raises(ValueError, match=r"8"):
        check(CompareConfig(network="nature", out=tmp_path))


def test_a_function_is_named_in_the_message(tmp_path: Path) -> None:
    def one_layer(shape: TUPLE, actions: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(10, actions))

    with pytest.raises(ValueError, match=r"network one_layer cannot take frames of shape \(4, 84, 84\)"):
        check(CompareConfig(out=tmp_path), network=one_layer)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_another_world_size_is_refused_alike_on_every_rank(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """As torchrun --nproc-per-node 3 starts us."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refused(layouts=("single@1", "dp2xpp2")) == (
        "the layouts need d·p = 4 ranks but 3 processes were started; use --nproc-per-node 4 or other --layouts"
    )
    assert refused(layouts=("single@1", "dp2")) == (
        "the layouts need d·p = 2 ranks but 3 processes were started; use --nproc-per-node 2 or other --layouts"
    )


def test_stages_in_several_processes_on_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gloo sends from host memory and NCCL refuses two ranks on one GPU; this machine need have none to be told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    config = CompareConfig(smoke=True, device="cuda", out=tmp_path)
    with pytest.raises(
        ValueError, match=r"layout pp2-1f1b/m8 sends messages between GPUs but 2 ranks share 1 here; write"
    ):
        check(config, layouts=["pp2-1f1b"])
    assert [row.stacked for row in check(config).layouts] == [False] * 3 + [True] * 4
    assert check(config).environment.hardware.startswith("1 × a GPU, ")


def test_a_good_configuration_becomes_a_job(tmp_path: Path) -> None:
    job = check(CompareConfig(smoke=True, out=tmp_path / "new" / "folder"), layouts=["dp2", "pp2-1f1b", "dp2"])
    assert [row.name for row in job.layouts] == ["dp2", "pp2-1f1b/m8"], "each row once"
    assert job.num_ranks == 2
    assert job.network_name == "nature"
    assert (job.spec.observation_shape, job.spec.num_actions) == ((4, 84, 84), 6)
    assert job.cores == tuple(sorted(os.sched_getaffinity(0)))
    first, second = job.make_network(), job.make_network()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert list((tmp_path / "new").rglob("*")) == [tmp_path / "new" / "folder"], "the probe file is gone"


def test_filled_schedules_without_lookahead_are_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompareConfig(smoke=True, lookahead=0, out=tmp_path)
    with pytest.warns(UserWarning, match="lookahead 0") as caught:
        check(config, layouts=["single@1", "pp2-td1f1b", "pp2-1f1b", "pp2-tdzb+stacked"])
    (warning,) = caught
    assert str(warning.message) == (
        "with --lookahead 0 no target pass can run ahead, so no gaps are filled in pp2-td1f1b/m8, "
        "pp2-tdzb+stacked/m8; set --lookahead 1"
    )
    check(config, layouts=["single@1", "pp2-1f1b"])
    check(replace(config, lookahead=1), layouts=["pp2-td1f1b"])
    monkeypatch.setenv("RANK", "1")  # one of several processes says it
    check(config, layouts=["pp2-td1f1b"])


@pytest.mark.parametrize(
    ("agent", "head", "wanted"),
    [
        ("double_dqn", None, "plain"),
        ("rainbow", None, "dueling"),
        ("rainbow", "plain", "plain"),
        ("dqn", "dueling", "dueling"),
    ],
)
def test_the_head_is_the_agents_unless_another_is_named(agent: str, head: Any, wanted: str, tmp_path: Path) -> None:
    job = check(CompareConfig(smoke=True, agent=agent, head=head, out=tmp_path), layouts=["single@1"])
    network = job.make_network()
    assert job.head == wanted
    assert hasattr(network.get_submodule("head"), "value_fc") is (wanted == "dueling")
    values = network(torch.zeros(2, 4, 84, 84, dtype=torch.uint8))
    make_agent(agent).check_output(tuple(values.shape[1:]))


def test_a_network_of_ones_own_must_have_the_agents_output(tmp_path: Path) -> None:
    def values_only(shape: tuple[int, ...], actions: int) -> nn.Module:
        class Flat(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.flatten(1).float()

        return nn.Sequential(Flat(), nn.LazyLinear(actions))

    config = CompareConfig(smoke=True, agent="c51", out=tmp_path)
    with pytest.raises(ValueError, match=r"it must return floats of shape \(2, 6, 51\), what this agent learns"):
        check(config, values_only, layouts=["single@1"])


def test_smoke_leaves_what_was_given() -> None:
    small = CompareConfig(smoke=True).resolved()
    assert (small.network, small.batch_size, small.num_microbatches) == ("", 16, 2)
    assert (small.steps, small.rounds, small.transitions) == (1, 2, 256)
    given = CompareConfig(smoke=True, network="impala", batch_size=32, rounds=5).resolved()
    assert (given.network, given.batch_size, given.rounds, given.transitions) == ("impala", 32, 5, 256)
    whole = CompareConfig()
    assert whole.resolved() is whole
    assert whole.transitions >= 2000


def test_one_text_means_one_layout_in_every_command(tmp_path: Path) -> None:
    """``pp2-1f1b`` had 4 micro-batches in `train`, 8 in `compare`, and 2 in `compare --smoke`."""
    in_train = check_train(TrainConfig(layout="pp2-1f1b", out=tmp_path)).layout
    for smoke in (False, True):
        (in_compare,) = check(CompareConfig(smoke=smoke, out=tmp_path), layouts=["pp2-1f1b"]).layouts
        assert in_compare == in_train
    with pytest.warns(UserWarning, match="num_microbatches 4 has no effect on named layouts; .* as in pp2-1f1b/m4"):
        (named,) = check(CompareConfig(num_microbatches=4, out=tmp_path), layouts=["pp2-1f1b"]).layouts
    assert named == in_train
    rows = check(CompareConfig(num_microbatches=4, out=tmp_path)).layouts
    assert {row.num_microbatches for row in rows if row.pipeline > 1} == {4}, "the default ones have what is asked"


def test_an_environment_decides_on_the_network_unless_one_is_named(tmp_path: Path) -> None:
    names = {"pong": "nature", "minatar-breakout": "minatar"}
    for env, name in names.items():
        assert check(CompareConfig(env=env, smoke=True, out=tmp_path), layouts=["single@1"]).network_name == name


def test_a_width_is_part_of_the_name(tmp_path: Path) -> None:
    job = check(CompareConfig(network="impala", width=0.5, out=tmp_path), layouts=["single@1"])
    assert job.network_name == "impala ×0.5"


def test_a_folder_without_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no records .* does not exist"):
        mpdqn.compare(render_only=tmp_path)
