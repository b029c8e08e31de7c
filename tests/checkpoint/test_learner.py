"""A learner's state by parameter name, from one cut of the network to another."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from mpdqn.checkpoint.learner import check_network, learner_state, learner_targets, shapes
from mpdqn.checkpoint.manifest import WrongCheckpoint
from mpdqn.learner import Learner
from mpdqn.mesh import World
from tests.test_learner import HALVES, WHOLE, batch, build, network


def learned(world: World, boundaries: tuple[int, ...], updates: int) -> Learner:
    learner = build(world, boundaries, target_period=2)
    for update in range(updates):
        learner.learn(batch(update))
    return learner


def put_in(learner: Learner, saved: dict[str, Tensor], updates: int) -> None:
    targets = learner_targets(learner, saved)
    assert targets.keys() == saved.keys()
    for name, target in targets.items():
        assert (target.dtype, target.shape) == (saved[name].dtype, saved[name].shape), name
        target.detach().copy_(saved[name])
    learner.update = updates


def copied(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner_state(learner).items()}


@pytest.mark.parametrize("updates", [0, 3], ids=["before the first update", "amid learning"])
@pytest.mark.parametrize("cut", [WHOLE, HALVES], ids=["whole", "halves"])
def test_a_learner_goes_on_from_the_state_of_another(cut: tuple[int, ...], updates: int, alone: World) -> None:
    """Every bit of it on the same cut, and on another one the same parameters to begin with."""
    first = learned(alone, WHOLE, updates)
    saved = copied(first)
    assert any(name.startswith("adam.") for name in saved) == (updates > 0)
    second = build(alone, cut, target_period=2, chain=other_weights())
    assert not torch.equal(learner_state(second)["online.conv1.weight"], saved["online.conv1.weight"])
    put_in(second, saved, updates)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in copied(second).items())
    for update in range(updates, updates + 3):
        first.learn(batch(update))
        second.learn(batch(update))
    one, other = copied(first), copied(second)
    assert one.keys() == other.keys()
    assert not torch.equal(one["online.conv1.weight"], saved["online.conv1.weight"])
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) if cut == WHOLE else torch.allclose(tensor, other[name], rtol=1e-10), (
            name
        )


def other_weights() -> torch.nn.Sequential:
    chain = network()
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(1)
    return chain


def test_it_is_not_copied(alone: World) -> None:
    learner = learned(alone, HALVES, 1)
    online = dict(learner.named_parameters())
    assert all(learner_state(learner)[f"online.{name}"].data_ptr() == p.data_ptr() for name, p in online.items())


def test_another_network_is_told_by_its_first_difference() -> None:
    here = shapes(network().state_dict())
    check_network(here, dict(here), "there")
    wider = here | {"conv1.weight": ("float64", (33, 4, 8, 8))}
    told = "there is of another network: conv1.weight is float64 [33, 4, 8, 8] there and float64 [32, 4, 8, 8]"
    with pytest.raises(WrongCheckpoint, match=re.escape(told) + " here; resume with the network that it was trained"):
        check_network(wider, here, "there")
    fewer = {name: entry for name, entry in here.items() if name != "conv1.bias"}
    size = list(here["conv1.bias"][1])
    with pytest.raises(WrongCheckpoint, match=re.escape(f"conv1.bias is missing there and float64 {size} here")):
        check_network(fewer, here, "there")
    with pytest.raises(WrongCheckpoint, match=re.escape(f"conv1.bias is float64 {size} there and missing here")):
        check_network(here, fewer, "there")
    single = {name: ("float32", shape) for name, (_, shape) in here.items()}
    with pytest.raises(WrongCheckpoint, match=r"is float32 \[.*\] there and float64 \[.*\] here"):
        check_network(single, here, "there")
