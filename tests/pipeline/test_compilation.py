"""Compiled stages: every schedule, any number of modules, and a count that is true."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, nop
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd

from mpdqn.dqn.agents import make_agent
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.pipeline.acceleration import Acceleration, candidates, choose_acceleration
from mpdqn.pipeline.compilation import Compiled
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.schedule import SCHEDULES, action_table
from tests.transparency import Case, filled_shards

FRAMES, STAGES = (2, 12, 12), 4
CASE = Case(family="tiny", batch_size=16)


def kinds(schedule: str) -> set[str]:
    virtual = SCHEDULES[schedule].virtual
    table = action_table(schedule, STAGES // virtual, 4, "T", virtual=virtual)
    return {action.kind for action in table.actions}


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 255


def network() -> nn.Sequential:
    """Four stages of layers whose inner activations a compiler may donate to its backward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        inner = [layer for _ in range(6) for layer in (nn.Linear(12, 12), nn.Tanh())]
        return nn.Sequential(Flat(), nn.Linear(288, 12), nn.Tanh(), *inner, nn.Linear(12, 5))


def learner(world: World, schedule: str, acceleration: Acceleration, agent: str = "dqn") -> Learner:
    """All four stages in this process."""
    virtual = SCHEDULES[schedule].virtual
    parallelism = Parallelism(pipeline=STAGES // virtual, num_microbatches=4, schedule=schedule, virtual=virtual)
    rules = make_agent(agent)
    return Learner(
        network(),
        mesh=Mesh(world, Plan.stacked(Partition(boundaries=(0, 3, 7, 11, 16)), parallelism), rules.letters),
        agent=rules,
        batch_size=16,
        observation_shape=FRAMES,
        config=LearnerConfig(lookahead=int(SCHEDULES[schedule].filled), max_grad_norm=float("inf")),
        acceleration=acceleration,
    )


def gradients(one: Learner) -> dict[str, Tensor]:
    """Those of the second of two updates."""
    shards = filled_shards(CASE)
    batches = [shards.sample(16, update) for update in range(3)]
    for now, upcoming in ((0, 1), (1, 2)):
        one.learn(batches[now], batches[upcoming] if one.config.lookahead else None)
    return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[n] - b[n]).square().sum()) for n in b)
    return float((difference / sum(float(t.square().sum()) for t in b.values())) ** 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_compiled(alone: World, schedule: str) -> None:
    """AOTAutograd donates buffers to its backward, which a split backward may not keep for a second time; and dynamo's
    limit of 8 per code object left the rest of 12 modules uncompiled."""
    agent = "double_dqn" if SCHEDULES[schedule].virtual == 2 else "dqn"
    one = learner(alone, schedule, Acceleration(compiled=True, backend="aot_eager"), agent)
    assert one.compiled_modules == 0, "they are compiled as they first run"
    found = gradients(one)
    assert one.compiled_modules == STAGES * (3 if agent == "double_dqn" else 2)
    plain = learner(alone, schedule, Acceleration(), agent)
    expected = gradients(plain)
    assert plain.compiled_modules == 0
    assert found.keys() == expected.keys()
    assert distance(found, expected) < 1e-6


RUNS: Counter[str] = Counter()
"""How often the backward graphs of modules ran that were compiled with the backend below."""


@register_backend
def counts_backwards(graph: Any, inputs: Any) -> Any:
    def compile_backward(backward: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            RUNS["backward"] += 1
            return backward(*args)

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=nop, bw_compiler=compile_backward)(graph, inputs)


@pytest.mark.parametrize("schedule", [name for name, kind in SCHEDULES.items() if "W" in kinds(name)])
def test_a_compiled_backward_runs_once_for_a_microbatch(alone: World, schedule: str) -> None:
    """torch's split ran the one graph of a stage for I, kept its donated buffers, and ran it again for W: twice the
    work, and an error where the same graph had once been compiled for a whole backward."""
    one = learner(alone, schedule, Acceleration(compiled=True, backend="counts_backwards"))
    RUNS.clear()
    gradients(one)
    assert RUNS["backward"] == 2 * STAGES * 4, "two updates of four micro-batches"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_inductor_runs_a_split_backward(alone: World) -> None:
    """The compiler that training uses, under a schedule with I and W."""
    one = learner(alone, "zbv", Acceleration(compiled=True))
    found = gradients(one)
    assert one.compiled_modules == STAGES * 2
    assert distance(found, gradients(learner(alone, "zbv", Acceleration()))) < 1e-5


def test_choosing_leaves_dynamos_limit_to_the_run(alone: World) -> None:
    tried = [replace(a, backend="eager") for a in candidates("auto", "auto")]
    for _ in range(3):
        choose_acceleration(tried, network(), torch.zeros((4, *FRAMES), dtype=torch.uint8))
    one = learner(alone, "1f1b", Acceleration(compiled=True, backend="eager"))
    gradients(one)
    assert one.compiled_modules == STAGES * 2


def test_what_ran_uncompiled_is_not_counted() -> None:
    module = Compiled(nn.Linear(3, 2), backend="eager")
    limit = torch._dynamo.config.recompile_limit
    for rows in range(1, limit + 1):
        module(torch.zeros(rows, 3))
        assert module.is_compiled
    module(torch.zeros(limit + 1, 3))
    assert not module.is_compiled, "dynamo gave up at its limit and ran the layers as they are"


def test_a_candidate_that_ran_uncompiled_is_not_chosen() -> None:
    tried = [Acceleration(), Acceleration(compiled=True, backend="eager")]
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(UserWarning, match="float32, compiled failed and is not used: torch.compile ran the layers unc"),
    ):
        assert choose_acceleration(tried, network(), torch.zeros((4, *FRAMES), dtype=torch.uint8)) == tried[0]
