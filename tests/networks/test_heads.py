import pytest
import torch
from torch import nn

from mpdqn.networks import NoisyLinear, make_network, output_shape
from mpdqn.networks.heads import DuelingHead


def test_dueling_advantages_have_mean_zero_about_the_value() -> None:
    head = DuelingHead(10, 6, 4).double()
    features = torch.randn(3, 10, dtype=torch.float64)
    values = head(features)
    state_value = head.value(head.value_fc(features).relu())
    assert values.shape == (3, 4)
    torch.testing.assert_close(values.mean(dim=1, keepdim=True), state_value, rtol=0, atol=1e-12)


def test_dueling_ignores_a_constant_added_to_all_advantages() -> None:
    head = DuelingHead(10, 6, 4).double()
    features = torch.randn(3, 10, dtype=torch.float64)
    before = head(features)
    with torch.no_grad():
        head.advantage.bias += 7
    torch.testing.assert_close(head(features), before, rtol=0, atol=1e-12)


def test_dueling_replaces_the_hidden_layer_by_two_streams() -> None:
    network = make_network("nature", (4, 84, 84), 18, head="dueling")
    assert [name for name, _ in network.named_children()][-2:] == ["flatten", "head"]
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters() if "head" in name}
    assert shapes["head.value_fc.weight"] == shapes["head.advantage_fc.weight"] == (512, 3136)
    assert shapes["head.value.weight"] == (1, 512)
    assert shapes["head.advantage.weight"] == (18, 512)


@pytest.mark.parametrize("head", ["plain", "dueling"])
def test_values_may_be_negative(head: str) -> None:
    network = make_network("impala", (1, 8, 8), 40, width=0.5, head=head)
    assert bool((network(torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)) < 0).any())


@pytest.mark.parametrize("head", ["plain", "dueling"])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("num_atoms", "branches", "shape"),
    [(1, 0, (6,)), (51, 0, (6, 51)), (1, 3, (3, 6)), (1, 1, (1, 6)), (7, 3, (3, 6, 7))],
)
def test_output_shapes(head: str, noisy: bool, num_atoms: int, branches: int, shape: tuple[int, ...]) -> None:
    options = {"head": head, "noisy": noisy, "num_atoms": num_atoms, "branches": branches}
    network = make_network("minatar", (4, 10, 10), 6, fc=8, **options)
    assert output_shape(6, num_atoms, branches) == shape
    assert network(torch.zeros(5, 4, 10, 10, dtype=torch.uint8)).shape == (5, *shape)
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert len(linear) == (2 if head == "plain" else 4)
    assert all(isinstance(layer, NoisyLinear) is noisy for layer in linear)


def test_dueling_atoms_are_value_plus_centred_advantage_for_each_atom() -> None:
    head = DuelingHead(10, 6, 4, num_atoms=3).double()
    features = torch.randn(2, 10, dtype=torch.float64)
    value = head.value(head.value_fc(features).relu())
    advantage = head.advantage(head.advantage_fc(features).relu()).reshape(2, 4, 3)
    logits = head(features)
    for action in range(4):
        expected = value + advantage[:, action] - sum(advantage[:, a] for a in range(4)) / 4
        torch.testing.assert_close(logits[:, action], expected, rtol=1e-12, atol=1e-12)


def test_dueling_branches_share_the_value_and_centre_their_own_advantages() -> None:
    head = DuelingHead(10, 6, 4, branches=3).double()
    features = torch.randn(2, 10, dtype=torch.float64)
    value = head.value(head.value_fc(features).relu())
    torch.testing.assert_close(head(features).mean(dim=2), value.expand(2, 3), rtol=0, atol=1e-12)


def test_a_plain_head_orders_branches_then_actions_then_atoms() -> None:
    """The order of the reshape decides what a row of the weights means; a saved network must go on meaning it."""
    network = make_network("minatar", (4, 10, 10), 6, fc=8, num_atoms=7, branches=3)
    with torch.no_grad():
        network.get_submodule("head").weight.zero_()
        network.get_submodule("head").bias.copy_(torch.arange(3 * 6 * 7))
    output = network(torch.zeros(1, 4, 10, 10, dtype=torch.uint8))
    assert output[0, 2, 4, 5].item() == (2 * 6 + 4) * 7 + 5
