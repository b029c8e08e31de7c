import pytest
import torch

from mpdqn.networks import make_network
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
