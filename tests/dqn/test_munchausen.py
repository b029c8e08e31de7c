"""Munchausen and action dimensions: against their formulas written out, over all joint actions where they are many."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mpdqn.dqn.agents import Agent, Labels, make_agent
from mpdqn.dqn.distributions import Categorical, HLGauss
from mpdqn.dqn.losses import td_target, value_of
from mpdqn.dqn.munchausen import Munchausen

B, D, A, K = 6, 3, 4, 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(action: Tensor) -> Labels:
    discount = torch.tensor([0.9, 0.9, 0.0, 0.81, 0.9, 0.0], dtype=torch.float64)
    return Labels(action=action, reward=random(B, seed=5), discount=discount, weight=random(B, seed=6).abs())


# Munchausen DQN


def test_munchausen_dqn_is_the_papers_equation_written_out():
    """With π = softmax(q̄/τ): r + α[τ log π(a|s)] from −1 to 0, + γ Σ π(a'|s')(q̄(s', a') − τ log π(a'|s'))."""
    agent, (alpha, tau) = make_agent("munchausen_dqn"), (0.9, 0.03)
    q, now, after = random(B, A).requires_grad_(), 0.05 * random(B, A, seed=1), 0.05 * random(B, A, seed=2)
    rows = labels(torch.arange(B) % A)
    target = []
    for b in range(B):
        log_policy = tau * math.log(float((now[b] / tau).softmax(0)[rows.action[b]]))
        next_policy = (after[b] / tau).softmax(0)
        soft = sum(float(next_policy[a] * (after[b, a] - tau * next_policy[a].log())) for a in range(A))
        target.append(float(rows.reward[b]) + alpha * max(-1.0, log_policy) + float(rows.discount[b]) * soft)
    error = q.gather(1, rows.action.unsqueeze(1)).squeeze(1) - torch.tensor(target, dtype=torch.float64)
    expected = (nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none") * rows.weight).sum() / 10
    loss, errors = agent.loss(q, {"T": after, "M": now}, rows, 10)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(errors, error.detach(), rtol=1e-12, atol=1e-14)
    assert torch.autograd.grad(loss, q)[0].count_nonzero() == B


def test_the_log_policy_is_clipped_below_and_never_rewards():
    m, q = Munchausen(), torch.tensor([[5.0, 0.0]], dtype=torch.float64)
    assert m.bonus(q, torch.tensor([1])).item() == pytest.approx(0.9 * -1.0), "τ·log π is −5 there"
    assert m.bonus(q, torch.tensor([0])).item() == pytest.approx(0.0, abs=1e-12)


def test_values_far_apart_neither_overflow_nor_vanish():
    m = Munchausen()
    q = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float32)
    assert m.soft_value(q).item() == pytest.approx(1e4)
    assert bool(m.log_policy(q).isfinite().all())


def test_a_small_temperature_is_dqn():
    """As τ → 0 the soft value becomes the maximum, and the clipped bonus of the greedy action 0."""
    m, q = Munchausen(tau=1e-6), random(B, A)
    torch.testing.assert_close(m.soft_value(q), q.max(dim=1).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(m.bonus(q, q.argmax(dim=1)), torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-5)


def test_munchausen_over_action_dimensions_is_munchausen_over_all_joint_actions():
    m, q = Munchausen(tau=0.2, clip=-1e9), random(B, D, A)
    joint = list(itertools.product(range(A), repeat=D))
    values = torch.stack([value_of(q, torch.tensor([action] * B)) for action in joint], dim=1)  # [B, A^D]
    torch.testing.assert_close(m.soft_value(q), m.soft_value(values), rtol=1e-12, atol=1e-12)
    for number in (0, 17, 63):
        action = torch.tensor([joint[number]] * B)
        torch.testing.assert_close(m.bonus(q, action), m.bonus(values, torch.full((B,), number)), rtol=1e-11, atol=0)


def test_munchausen_with_a_histogram_has_the_scalar_target():
    gauss = HLGauss(num_bins=K, v_min=-3, v_max=3)
    agent = Agent(name="mine", munchausen=Munchausen(), distribution=gauss)
    q, values, rows = (
        random(B, A, K),
        {"T": random(B, A, K, seed=1), "M": random(B, A, K, seed=2)},
        labels(torch.arange(B) % A),
    )
    now, after = (agent.action_values(values[letter]) for letter in "MT")
    m = Munchausen()
    target = gauss.histogram(rows.reward + m.bonus(now, rows.action) + rows.discount * m.soft_value(after))
    expected = nn.functional.cross_entropy(q[range(B), rows.action], target, reduction="none")
    torch.testing.assert_close(
        agent.loss(q, values, rows, 10)[0], (expected * rows.weight).sum() / 10, rtol=1e-12, atol=0
    )


def test_munchausens_target_distribution_has_the_mean_of_its_scalar_target():
    agent = Agent(name="mine", munchausen=Munchausen(), distribution=Categorical(num_atoms=K, v_min=-3, v_max=3))
    values, reward, discount = {"T": random(B, A, K)}, random(B, seed=1), torch.full((B,), 0.9, dtype=torch.float64)
    points, masses = agent._target_distribution(reward, discount, values)
    assert points.shape == masses.shape == (B, A * K)
    torch.testing.assert_close(masses.sum(dim=1), torch.ones(B, dtype=torch.float64))
    mean = reward + discount * Munchausen().soft_value(agent.action_values(values["T"]))
    torch.testing.assert_close((points * masses).sum(dim=1), mean, rtol=1e-11, atol=1e-12)


# DecQN


@pytest.mark.parametrize("double", [False, True])
def test_decqn_is_the_mean_over_dimensions_of_their_own_best(double: bool):
    agent = Agent(name="mine", branching=True, double=double)
    q, target, online = random(B, D, A).requires_grad_(), random(B, D, A, seed=1), random(B, D, A, seed=2)
    rows = labels(torch.randint(A, (B, D), generator=torch.Generator().manual_seed(3)))
    error = []
    for b in range(B):
        chooser = online if double else target
        best = sum(float(target[b, d, chooser[b, d].argmax()]) for d in range(D)) / D
        value = sum(float(q.detach()[b, d, rows.action[b, d]]) for d in range(D)) / D
        error.append(value - (float(rows.reward[b]) + float(rows.discount[b]) * best))
    loss, errors = agent.loss(q, {"T": target} | ({"D": online} if double else {}), rows, B)
    torch.testing.assert_close(errors, torch.tensor(error, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    gradient = torch.autograd.grad(loss, q)[0]
    clipped = torch.tensor(error, dtype=torch.float64).clamp(-1, 1) * rows.weight / (B * D)
    chosen = gradient.gather(2, rows.action.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, clipped.unsqueeze(1).expand(B, D), rtol=1e-12, atol=0)
    assert gradient.count_nonzero() == B * D


def test_the_best_joint_action_has_the_best_of_each_dimension():
    q = random(B, D, A)
    joint = torch.stack([value_of(q, torch.tensor([a] * B)) for a in itertools.product(range(A), repeat=D)], dim=1)
    torch.testing.assert_close(td_target(torch.zeros(B), torch.ones(B), q), joint.max(dim=1).values, check_dtype=False)


def test_one_dimension_is_double_dqn_and_needs_no_dimension_in_its_actions():
    branching, plain = make_agent("decqn"), make_agent("double_dqn")
    q, values, rows = random(B, A), {"T": random(B, A, seed=1), "D": random(B, A, seed=2)}, labels(torch.arange(B) % A)
    expected = plain.loss(q, values, rows, B)
    one = {letter: v.unsqueeze(1) for letter, v in values.items()}
    for action in (rows.action, rows.action.unsqueeze(1)):
        ours = branching.loss(q.unsqueeze(1), one, Labels(**vars(rows) | {"action": action}), B)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
