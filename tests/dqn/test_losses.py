"""The losses by hand, over parts of a batch, and against TorchRL's `DQNLoss`."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mpdqn.dqn.agents import Agent, Labels, make_agent
from mpdqn.dqn.losses import global_mean, huber, td_error, td_target

BATCH, ACTIONS, FEATURES = 24, 5, 7
DISCOUNT = 31 / 32  # exact in float32, in which TorchRL keeps it


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_td_target_is_reward_plus_discounted_best_value_of_the_target_network():
    next_q = numbers(1, 5, 2, 9, -3, -1).reshape(2, 3)
    target = td_target(numbers(0.5, 1), numbers(0.9, 0.81), next_q)
    assert torch.equal(target, numbers(0.5 + 0.9 * 5, 1 + 0.81 * 9))


def test_double_dqn_takes_the_action_of_the_online_network_and_its_value_from_the_target_network():
    next_target_q = numbers(1, 5, 2, 9, -3, -1).reshape(2, 3)
    next_online_q = numbers(7, 0, 0, 0, 0, 7).reshape(2, 3)
    target = td_target(numbers(0.5, 1), numbers(0.9, 0.81), next_target_q, next_online_q)
    assert torch.equal(target, numbers(0.5 + 0.9 * 1, 1 + 0.81 * -1))


def test_a_terminal_state_is_not_bootstrapped_from():
    assert td_target(numbers(-1), numbers(0), numbers(1e6, 2e6).reshape(1, 2)).item() == -1


def test_td_error_is_value_of_the_action_taken_minus_target():
    q = numbers(1, 2, 3, 4, 5, 6).reshape(2, 3)
    assert torch.equal(td_error(q, torch.tensor([2, 0]), numbers(1, 5)), numbers(2, -1))


def test_huber_is_quadratic_up_to_delta_and_linear_beyond():
    assert torch.allclose(huber(numbers(0, 0.5, -1, 3, -3)), numbers(0, 0.125, 0.5, 2.5, 2.5), rtol=0, atol=1e-15)
    assert torch.allclose(huber(numbers(1, 2, -4), delta=2), numbers(0.5, 2, 2 * (4 - 1)), rtol=0, atol=1e-15)


def test_the_gradient_of_huber_is_the_clipped_error():
    error = numbers(0.25, -0.5, 7, -9).requires_grad_()
    huber(error).sum().backward()
    assert torch.equal(error.grad, numbers(0.25, -0.5, 1, -1))


def test_global_mean_divides_the_weighted_sum_by_the_whole_batch():
    assert global_mean(numbers(1, 2), numbers(1, 0.5), 8).item() == 2 / 8


@pytest.mark.parametrize(("name", "best"), [("dqn", 5), ("double_dqn", 1)])
def test_the_agents_loss_by_hand(name: str, best: float):
    q = numbers(1, 2, 3).reshape(1, 3).requires_grad_()
    values = {"T": numbers(1, 5, 2).reshape(1, 3), "D": numbers(7, 0, 0).reshape(1, 3)}
    agent = make_agent(name)
    labels = Labels(action=torch.tensor([1]), reward=numbers(0.5), discount=numbers(0.5), weight=numbers(0.25))
    loss, error = agent.loss(q, {p.letter: values[p.letter] for p in agent.passes}, labels, 4)
    expected = 2 - (0.5 + 0.5 * best)
    assert error.item() == expected
    assert not error.requires_grad
    assert loss.item() == 0.25 * (abs(expected) - 0.5 if abs(expected) > 1 else expected**2 / 2) / 4


class Transitions:
    """A batch, an online and a target network with different weights, all float64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.online = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, ACTIONS)).double()
        self.target = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, ACTIONS)).double()
        with torch.no_grad():
            for parameter in (*self.online.parameters(), *self.target.parameters()):
                parameter.copy_(normal(*parameter.shape))
        self.obs, self.next_obs = normal(BATCH, FEATURES), normal(BATCH, FEATURES)
        self.terminated = torch.rand(BATCH, generator=generator) < 0.3
        self.labels = Labels(
            action=torch.randint(ACTIONS, (BATCH,), generator=generator),
            reward=2 * normal(BATCH),
            discount=DISCOUNT * (~self.terminated).double(),
            weight=torch.rand(BATCH, dtype=torch.float64, generator=generator),
        )

    def loss(self, agent: Agent, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        networks = {"online": self.online, "target": self.target}
        with torch.no_grad():
            values = {p.letter: networks[p.network](self.next_obs[rows]) for p in agent.passes}
        labels = Labels(**{name: column[rows] for name, column in vars(self.labels).items()})
        return agent.loss(self.online(self.obs[rows]), values, labels, BATCH)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.online.parameters())))


@pytest.mark.parametrize("agent", ["dqn", "double_dqn"])
@pytest.mark.parametrize("cuts", [(12,), (6, 12, 18), (1, 2, 20)], ids=["halves", "quarters", "unequal"])
def test_parts_of_a_batch_add_up_to_the_loss_and_gradient_of_the_whole(agent: str, cuts: tuple[int, ...]):
    batch = Transitions()
    whole, errors = batch.loss(make_agent(agent))
    parts = [batch.loss(make_agent(agent), slice(a, b)) for a, b in zip((0, *cuts), (*cuts, BATCH), strict=True)]

    assert torch.allclose(sum(loss for loss, _ in parts), whole, rtol=1e-12)
    assert torch.allclose(torch.cat([error for _, error in parts]), errors, rtol=1e-12)
    summed = [torch.stack(g).sum(dim=0) for g in zip(*(batch.gradients(loss) for loss, _ in parts), strict=True)]
    for ours, expected in zip(summed, batch.gradients(whole), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("agent", ["dqn", "double_dqn"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
def test_loss_td_errors_and_gradients_are_those_of_torchrl(agent: str, weighted: bool):
    from tensordict import TensorDict
    from torchrl.data import Categorical
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss, ValueEstimators

    batch = Transitions()
    if not weighted:
        batch.labels.weight.fill_(1)
    actor = QValueActor(copy.deepcopy(batch.online), in_keys=["observation"], spec=Categorical(ACTIONS))
    torchrl_loss = DQNLoss(actor, loss_function="smooth_l1", double_dqn=agent == "double_dqn", reduction="none")
    torchrl_loss.make_value_estimator(ValueEstimators.TD0, gamma=DISCOUNT)
    targets = {name.partition("module.0.module.")[2]: buffer for name, buffer in torchrl_loss.named_buffers()}
    for name, parameter in batch.target.named_parameters():
        targets[name].copy_(parameter.detach())
    data = TensorDict(
        {
            "observation": batch.obs,
            "action": batch.labels.action,
            "next": {
                "observation": batch.next_obs,
                "reward": batch.labels.reward.unsqueeze(1),
                "done": batch.terminated.unsqueeze(1),
                "terminated": batch.terminated.unsqueeze(1),
            },
        },
        [BATCH],
    )
    rows = torchrl_loss(data)["loss"]
    assert rows.shape == (BATCH,)
    expected = (batch.labels.weight * rows).mean()
    expected.backward()

    loss, errors = batch.loss(make_agent(agent))
    assert torch.allclose(loss, expected, rtol=1e-12, atol=0)
    assert torch.allclose(errors**2, data["td_error"].squeeze(-1), rtol=1e-12, atol=1e-12)
    gradients = {name.partition("module.0.module.")[2]: p.grad for name, p in torchrl_loss.named_parameters()}
    for (name, _), gradient in zip(batch.online.named_parameters(), batch.gradients(loss), strict=True):
        assert torch.allclose(gradient, gradients.pop(name), rtol=1e-12, atol=1e-12)
    assert not gradients
