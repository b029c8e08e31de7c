"""Precision and compilation: chosen by measurement, the same computation on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Bfloat16Casts(TorchDispatchMode):
    """Counts the casts to bfloat16 of tensors with these shapes."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("schedule", "recompute"), [("1f1b", "none"), ("1f1b", "boundaries"), ("tdzb", "all")])
def test_trained_weights_are_cast_once_a_step_and_no_bit_changes(alone: World, schedule: str, recompute: str) -> None:
    """Autocast forgot its casts at the end of each forward: m casts of every weight for one update."""
    m, found, counts = 4, [], []
    for kept in (True, False):
        chain, agent = tiny_network(FRAMES), make_agent("double_dqn")
        parallelism = Parallelism(pipeline=2, num_microbatches=m, schedule=schedule)
        plan = Plan.stacked(Partition(boundaries=(0, 9, 18)), parallelism, recompute=(recompute,) * 2)
        learner = Learner(
            chain,
            mesh=Mesh(alone, plan, agent.letters),
            agent=agent,
            batch_size=16,
            observation_shape=FRAMES,
            acceleration=Acceleration(precision="bf16"),
        )
        if not kept:
            learner._pipeline._casts_weights = False
        shapes = {p.shape for name, p in chain.named_parameters() if name in ("13.weight", "15.weight")}
        assert len(shapes) == 2
        for update in range(2):
            with Bfloat16Casts(shapes) as casts:
                learner.learn(filled_shards(CASE).sample(16, update))
        counts.append(casts.count)
        found.append({name: p.grad for name, p in learner.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    without_gradient = 2 * 2 * m  # two weights, T and D
    trained = 2 * m * (2 if recompute == "boundaries" else 1)  # in the last stage, which runs no F before its R
    assert counts == [without_gradient + 2, without_gradient + trained]


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
