"""Stages are the network, cut: the same names, the same parameters, the same numbers."""

import itertools

import pytest
import torch
from torch import nn

from mpdqn.partition import split
from mpdqn.plan import Partition

from .networks import small_network


def partitions(n: int) -> list[Partition]:
    cuts = [cuts for k in range(n) for cuts in itertools.combinations(range(1, n), k)]
    return [Partition(boundaries=(0, *c, n)) for c in cuts]


@pytest.mark.parametrize("partition", partitions(5), ids=lambda partition: str(partition.boundaries))
def test_stages_compute_what_the_network_computes(partition: Partition) -> None:
    torch.manual_seed(0)
    model = small_network().double()
    x = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    q = model(x)
    q.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    stages = split(model, partition)
    assert len(stages) == partition.num_stages
    for stage in stages:
        x = stage(x)
    x.square().sum().backward()
    assert torch.equal(x, q)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: g.shape for name, g in expected.items()}
    # The stages wrote into the model's own gradients.
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


def test_names_and_parameters_are_those_of_the_network() -> None:
    numbered = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Sequential(nn.Conv2d(2, 1, 1)))
    for model, last in ((numbered, "3.0.weight"), (small_network(), "head.weight")):
        boundaries = (0, 2, len(model) - 1, len(model))
        stages = split(model, Partition(boundaries=boundaries))
        named = [dict(stage.named_parameters()) for stage in stages]
        assert {name: p for parameters in named for name, p in parameters.items()} == dict(model.named_parameters())
        assert last in named[2]
        assert all(
            a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            for parameters in named
            for name, a in parameters.items()
            for b in [model.get_parameter(name)]
        )


def test_modes_are_kept() -> None:
    model = small_network().eval()
    stages = split(model, Partition(boundaries=(0, 2, 5)))
    assert not any(module.training for stage in stages for module in stage.modules())


def test_a_partition_of_another_network() -> None:
    with pytest.raises(
        ValueError, match=r"has 5 layers but the partition \(0, 2, 6\) was made for 6; balance a profile"
    ):
        split(small_network(), Partition(boundaries=(0, 2, 6)))


def test_not_a_flat_network() -> None:
    with pytest.raises(TypeError, match=r"Linear cannot be split; write it as a flat torch\.nn\.Sequential"):
        split(nn.Linear(2, 2), Partition(boundaries=(0, 1)))  # type: ignore[arg-type]


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    model[2].weight = model[0].weight
    split(model, Partition(boundaries=(0, 3, 4)))  # in one stage they may be tied
    with pytest.raises(ValueError, match=r"'0\.weight' of stage 0 and '2\.weight' of stage 1 are one parameter"):
        split(model, Partition(boundaries=(0, 2, 4)))


def test_one_layer_in_two_stages() -> None:
    layer, relu = nn.Linear(3, 3), nn.ReLU()
    split(nn.Sequential(layer, relu, nn.Linear(3, 3), relu), Partition(boundaries=(0, 2, 4)))  # a ReLU has no weights
    with pytest.raises(ValueError, match=r"'0\.weight' of stage 0 and '2\.weight' of stage 1"):
        split(nn.Sequential(layer, relu, layer), Partition(boundaries=(0, 2, 3)))
