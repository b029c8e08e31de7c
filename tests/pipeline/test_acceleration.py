"""Precision and compilation: chosen by measurement, the same computation on every layout."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from mpdqn.dqn.agents import make_agent
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.pipeline import acceleration as module
from mpdqn.pipeline.acceleration import Acceleration, candidates, choose_acceleration
from mpdqn.plan import Parallelism, Partition, Plan
from tests.transparency import Case, filled_shards, tiny_network

FRAMES = (2, 12, 12)
CASE = Case(family="tiny", batch_size=16)


def gradients(world: World, cuts: tuple[int, ...], acceleration: Acceleration) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and TD errors of one update of two micro-batches, all stages in this process."""
    parallelism = Parallelism(pipeline=len(cuts) - 1, num_microbatches=2, schedule="1f1b")
    plan = Plan.stacked(Partition(boundaries=cuts), parallelism)
    agent = make_agent("double_dqn")
    learner = Learner(
        tiny_network(FRAMES),
        mesh=Mesh(world, plan, agent.letters),
        agent=agent,
        batch_size=16,
        observation_shape=FRAMES,
        acceleration=acceleration,
    )
    step = learner.learn(filled_shards(CASE).sample(16, 0))
    assert step.td_errors is not None
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}, step.td_errors


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[n] - b[n]).square().sum()) for n in b)
    return float((difference / sum(float(t.square().sum()) for t in b.values())) ** 0.5)


def test_bf16_is_bf16_and_the_same_wherever_it_is_cut(alone: World) -> None:
    plain, plain_errors = gradients(alone, (0, 18), Acceleration())
    whole, errors = gradients(alone, (0, 18), Acceleration(precision="bf16"))
    assert 1e-4 < distance(whole, plain) < 0.1
    assert errors.dtype == plain_errors.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in whole.values())
    for cuts in ((0, 3, 18), (0, 5, 11, 18)):
        cut, cut_errors = gradients(alone, cuts, Acceleration(precision="bf16"))
        assert torch.equal(cut_errors, errors)
        assert distance(cut, whole) < 1e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_stages_compute_the_same(alone: World) -> None:
    plain, errors = gradients(alone, (0, 9, 18), Acceleration())
    compiled, compiled_errors = gradients(alone, (0, 9, 18), Acceleration(compiled=True))
    assert distance(compiled, plain) < 1e-5
    torch.testing.assert_close(compiled_errors, errors, rtol=1e-5, atol=1e-5)


def test_what_is_tried() -> None:
    assert candidates("float32", "off") == [Acceleration()]
    everything = candidates("auto", "auto")
    assert len(everything) == 6
    assert everything[0] == Acceleration()
    assert candidates("bf16", "on") == [Acceleration(precision="bf16", compiled=True)]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [([1.0, 0.97, 0.96], 0), ([1.0, 0.9, 0.89], 1), ([1.0, 0.9, 0.5], 2), ([1.0, 2.0, 0.9], 2)],
)
def test_a_plainer_one_is_kept_unless_another_is_clearly_faster(
    seconds: list[float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = candidates("auto", "off")
    times = dict(zip(tried, seconds, strict=True))
    monkeypatch.setattr(module, "_seconds", lambda acceleration, network, example: times[acceleration])
    assert choose_acceleration(tried, tiny_network(FRAMES), torch.zeros(1)) == tried[chosen]


def test_choosing_measures_and_leaves_the_network_as_it_was() -> None:
    network = tiny_network(FRAMES)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    frames = torch.zeros(4, *FRAMES, dtype=torch.uint8)
    tried = [Acceleration(), Acceleration(precision="bf16")]
    assert choose_acceleration(tried, network, frames) in tried
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
