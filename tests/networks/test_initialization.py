from collections import OrderedDict

import pytest
import torch
from torch import nn

from mpdqn.networks import initialize, make_network
from mpdqn.randomness import keyed_seed

SHAPE = (2, 40, 40)


def build(**options: object) -> nn.Sequential:
    return make_network("impala", SHAPE, 3, width=0.5, fc=8, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_seed_decides_the_weights() -> None:
    assert equal(build(seed=3), build(seed=3))
    assert not torch.equal(build(seed=3).fc.weight, build(seed=4).fc.weight)


def test_the_callers_generator_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert equal(build(), first)


def test_a_weight_depends_on_its_name_not_on_the_order() -> None:
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    forward = nn.Sequential(OrderedDict(a=a, b=b))
    backward = nn.Sequential(OrderedDict(b=nn.Linear(3, 4), a=nn.Linear(3, 4)))
    initialize(forward, 5)
    initialize(backward, 5)
    assert torch.equal(forward.a.weight, backward.a.weight)
    assert torch.equal(forward.b.bias, backward.b.bias)
    assert not torch.equal(forward.a.weight, forward.b.weight)


def test_a_stage_initialises_to_the_weights_of_the_whole() -> None:
    whole = build(seed=9)
    expected = {name: value.clone() for name, value in whole.state_dict().items()}
    stage = whole[5:9]
    for parameter in whole.parameters():
        nn.init.zeros_(parameter)
    initialize(stage, 9)
    assert all(torch.equal(value, expected[name]) for name, value in stage.state_dict().items())


def test_two_networks_share_the_weights_of_the_layers_they_share() -> None:
    few, many = build(head="plain"), make_network("impala", SHAPE, 9, width=0.5, fc=8)
    assert torch.equal(few.section3_block2.conv2.weight, many.section3_block2.conv2.weight)


def test_the_stream_is_the_documented_one() -> None:
    network = build(seed=7)
    torch.manual_seed(keyed_seed("initialization", 7, "section1_block1.conv2"))
    expected = nn.Conv2d(8, 8, 3, padding=1)
    assert torch.equal(network.section1_block1.conv2.weight, expected.weight)
    assert torch.equal(network.section1_block1.conv2.bias, expected.bias)


def test_norms_start_as_identity() -> None:
    norm = make_network("resnet18", (1, 8, 8), 2, fc=4).stem_norm
    assert torch.equal(norm.weight, torch.ones(64))
    assert torch.equal(norm.bias, torch.zeros(64))


def test_parameters_on_an_accelerator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        device = torch.device("cuda", 0)

    layer = nn.Linear(1, 1)
    monkeypatch.setattr(layer, "named_parameters", lambda: [("weight", Elsewhere())])
    with pytest.raises(ValueError, match="weight is on cuda:0; initialise on the CPU"):
        initialize(layer, 0)
