"""Distributional losses: by hand, against TorchRL's `DistributionalDQNLoss`, and against the papers' own formulas."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mpdqn.dqn.agents import Agent, Labels, make_agent
from mpdqn.dqn.distributions import Categorical, HLGauss, expectation
from mpdqn.dqn.losses import cross_entropy, kl_divergence

BATCH, ACTIONS, FEATURES, ATOMS = 24, 5, 7, 11
GAMMA, N = 31 / 32, 3


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scattered_projection(distribution: Categorical, points: Tensor, masses: Tensor) -> Tensor:
    """Algorithm 1 of Bellemare et al. 2017, one point at a time."""
    step = (distribution.v_max - distribution.v_min) / (distribution.num_atoms - 1)
    projected = torch.zeros(len(points), distribution.num_atoms, dtype=points.dtype)
    for row in range(len(points)):
        for point, mass in zip(points[row].tolist(), masses[row].tolist(), strict=True):
            place = (min(max(point, distribution.v_min), distribution.v_max) - distribution.v_min) / step
            low, high = math.floor(place), math.ceil(place)
            if low == high:
                projected[row, low] += mass
            else:
                projected[row, low] += mass * (high - place)
                projected[row, high] += mass * (place - low)
    return projected


# C51


def test_a_point_gives_its_mass_to_the_atoms_beside_it():
    c51 = Categorical(num_atoms=5, v_min=-2, v_max=2)
    points, masses = numbers(-9, 0.25, 1, 7).reshape(1, 4), numbers(0.1, 0.4, 0.2, 0.3).reshape(1, 4)
    expected = numbers(0.1, 0, 0.3, 0.1 + 0.2, 0.3).reshape(1, 5)
    torch.testing.assert_close(c51.project(points, masses), expected, rtol=0, atol=1e-12)


def test_projection_is_algorithm_1_of_the_paper_and_keeps_mass_and_mean():
    c51 = Categorical(num_atoms=ATOMS, v_min=-3, v_max=4)
    points, masses = random(BATCH, 7, scale=2.5), random(BATCH, 7, seed=1).softmax(dim=1)
    projected = c51.project(points, masses)
    torch.testing.assert_close(projected, scattered_projection(c51, points, masses), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projected.sum(dim=1), torch.ones(BATCH, dtype=torch.float64))
    inside = points.clamp(-3, 4)
    torch.testing.assert_close(projected @ c51.support(projected), (inside * masses).sum(dim=1))


def test_terminal_rows_learn_the_reward_alone():
    agent = Agent(name="mine", distribution=Categorical(num_atoms=5, v_min=-2, v_max=2))
    q = torch.zeros(1, 2, 5, dtype=torch.float64)
    labels = Labels(action=torch.tensor([1]), reward=numbers(1.5), discount=numbers(0), weight=numbers(1))
    loss, _ = agent.loss(q, {"T": random(1, 2, 5)}, labels, 1)
    torch.testing.assert_close(
        loss, torch.tensor(math.log(5), dtype=torch.float64)
    )  # of (0, 0, 0, ½, ½) under 1/5 each


class Transitions:
    """A batch of n-step transitions, an online and a target network with different weights, all float64."""

    def __init__(self, outputs: int = ATOMS) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        def network() -> nn.Sequential:
            layers = [nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, ACTIONS * outputs)]
            return nn.Sequential(*layers, nn.Unflatten(-1, (ACTIONS, outputs))).double()

        self.online, self.target = network(), network()
        with torch.no_grad():
            for parameter in (*self.online.parameters(), *self.target.parameters()):
                parameter.copy_(normal(*parameter.shape))
        self.obs, self.next_obs = normal(BATCH, FEATURES), normal(BATCH, FEATURES)
        self.terminated = torch.rand(BATCH, generator=generator) < 0.3
        self.steps = torch.randint(1, N + 1, (BATCH,), generator=generator)  # shorter where an episode was cut off
        self.labels = Labels(
            action=torch.randint(ACTIONS, (BATCH,), generator=generator),
            reward=2 * normal(BATCH),
            discount=GAMMA**self.steps * (~self.terminated).double(),
            weight=torch.rand(BATCH, dtype=torch.float64, generator=generator),
        )

    def loss(self, agent: Agent, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        networks = {"online": self.online, "target": self.target}
        frames = {"obs": self.obs, "next_obs": self.next_obs}
        with torch.no_grad():
            values = {p.letter: networks[p.network](frames[p.frames][rows]) for p in agent.passes}
        start, stop, _ = rows.indices(BATCH)
        return agent.loss(self.online(self.obs[rows]), values, self.labels.rows(start, stop), BATCH)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.online.parameters())))


@pytest.fixture
def float64() -> Iterator[None]:
    """TorchRL projects in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
@pytest.mark.usefixtures("float64")
def test_double_c51_over_n_steps_is_torchrls(weighted: bool):
    """TorchRL chooses with the online network always, wants [B, K, A], and gives the cross-entropy of each row."""
    from tensordict import TensorDict
    from torchrl.data import Categorical as CategoricalSpec
    from torchrl.modules import DistributionalQValueActor
    from torchrl.objectives import DistributionalDQNLoss

    class AtomsFirst(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, observation: Tensor) -> Tensor:
            return self.network(observation).transpose(-1, -2)

    batch = Transitions()
    if not weighted:
        batch.labels.weight.fill_(1)
    agent = Agent(name="mine", double=True, distribution=Categorical(num_atoms=ATOMS, v_min=-6, v_max=6))
    assert agent.distribution is not None
    support = agent.distribution.support(batch.obs)
    actor = DistributionalQValueActor(
        AtomsFirst(copy.deepcopy(batch.online)), support=support, in_keys=["observation"], spec=CategoricalSpec(ACTIONS)
    )
    torchrl_loss = DistributionalDQNLoss(actor, gamma=GAMMA, reduction="none", use_prioritized_weights=False)
    names = {name: name.rpartition("network.")[2] for name, _ in torchrl_loss.named_parameters()}
    targets = {name.rpartition("network.")[2]: buffer for name, buffer in torchrl_loss.named_buffers()}
    for name, parameter in batch.target.named_parameters():
        targets[name].copy_(parameter.detach())
    data = TensorDict(
        {
            "observation": batch.obs,
            "action": batch.labels.action,
            "steps_to_next_obs": batch.steps.unsqueeze(1),
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

    loss, _ = batch.loss(agent)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = {names[name]: p.grad for name, p in torchrl_loss.named_parameters() if p.grad is not None}
    for (name, _), gradient in zip(batch.online.named_parameters(), batch.gradients(loss), strict=True):
        torch.testing.assert_close(gradient, gradients.pop(name), rtol=1e-11, atol=1e-12)
    assert not gradients


def test_the_single_network_chooses_by_the_target_networks_means():
    """C51 without Double: written out, with the projection of the paper's algorithm."""
    batch, c51 = Transitions(), Categorical(num_atoms=ATOMS, v_min=-6, v_max=6)
    agent = Agent(name="mine", distribution=c51)
    with torch.no_grad():
        masses = batch.target(batch.next_obs).softmax(dim=-1)
        best = (masses * c51.support(masses)).sum(dim=-1).argmax(dim=1)
    points = batch.labels.reward.unsqueeze(1) + batch.labels.discount.unsqueeze(1) * c51.support(masses)
    target = scattered_projection(c51, points, masses[range(BATCH), best])
    logits = batch.online(batch.obs)[range(BATCH), batch.labels.action]
    rows = nn.functional.cross_entropy(logits, target, reduction="none")
    loss, errors = batch.loss(agent)
    torch.testing.assert_close(loss, (batch.labels.weight * rows).mean(), rtol=1e-12, atol=0)
    divergence = nn.functional.kl_div(logits.log_softmax(dim=1), target, reduction="none").sum(dim=1)
    torch.testing.assert_close(errors, divergence.detach(), rtol=1e-10, atol=1e-12)
    assert not errors.requires_grad


# HL-Gauss


def test_the_histogram_is_the_gaussians_share_of_each_bin():
    gauss = HLGauss(num_bins=8, v_min=-4, v_max=4, sigma_ratio=0.75)
    target = numbers(-3.9, 0.0, 0.3, 2.5)
    histogram = gauss.histogram(target)
    edges = torch.linspace(-4, 4, 9, dtype=torch.float64)
    normal = torch.distributions.Normal(target.unsqueeze(1), 0.75)  # σ = 0.75 bins of width 1
    share = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    torch.testing.assert_close(histogram, share / share.sum(dim=1, keepdim=True), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(histogram.sum(dim=1), torch.ones(4, dtype=torch.float64))


def test_the_histogram_of_a_value_has_its_mean():
    """Far from the ends; with σ of 0.75 bins the mean is off by less than a thousandth of a bin."""
    gauss = HLGauss(num_bins=51, v_min=-10, v_max=10)
    target = torch.linspace(-7, 7, 333, dtype=torch.float64)
    histogram = gauss.histogram(target)
    means = histogram @ gauss.support(histogram)
    assert (means - target).abs().max() < 1e-3 * gauss.bin_width
    torch.testing.assert_close(expectation(gauss, histogram.log()), means)


def test_targets_outside_the_bins_are_clipped_and_finite():
    gauss = HLGauss(num_bins=11, v_min=-1, v_max=1)
    histogram = gauss.histogram(numbers(-1e6, -1, 1, 1e6))
    assert bool(histogram.isfinite().all())
    assert torch.equal(histogram[0], histogram[1])
    assert torch.equal(histogram[2], histogram[3])
    assert histogram[3].argmax() == 10


@pytest.mark.parametrize("double", [False, True])
def test_hl_gauss_by_hand(double: bool):
    batch, gauss = Transitions(), HLGauss(num_bins=ATOMS, v_min=-6, v_max=6)
    agent = Agent(name="mine", distribution=gauss, double=double)
    with torch.no_grad():
        values = batch.target(batch.next_obs).softmax(dim=-1) @ gauss.support(batch.obs)
        choice = batch.online(batch.next_obs).softmax(dim=-1) @ gauss.support(batch.obs) if double else values
        best = values[range(BATCH), choice.argmax(dim=1)]
        target = gauss.histogram(batch.labels.reward + batch.labels.discount * best)
    logits = batch.online(batch.obs)[range(BATCH), batch.labels.action]
    rows = nn.functional.cross_entropy(logits, target, reduction="none")
    loss, errors = batch.loss(agent)
    torch.testing.assert_close(loss, (batch.labels.weight * rows).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(errors, kl_divergence(target, logits))


# Both


def test_the_priority_of_what_is_predicted_exactly_is_zero():
    target = random(3, ATOMS).softmax(dim=1)
    assert kl_divergence(target, target.log()).abs().max() < 1e-14
    assert bool((cross_entropy(target, target.log()) > 1).all())
    certain = torch.eye(ATOMS, dtype=torch.float64)[:3]
    assert bool(kl_divergence(certain, random(3, ATOMS)).isfinite().all()), "0·log 0 is 0"


@pytest.mark.parametrize("name", ["c51", "rainbow", "hl_gauss"])
@pytest.mark.parametrize("cuts", [(12,), (1, 2, 20)], ids=["halves", "unequal"])
def test_parts_of_a_batch_add_up_to_the_loss_and_gradient_of_the_whole(name: str, cuts: tuple[int, ...]):
    batch = Transitions(outputs=51)
    whole, errors = batch.loss(make_agent(name))
    parts = [batch.loss(make_agent(name), slice(a, b)) for a, b in zip((0, *cuts), (*cuts, BATCH), strict=True)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([error for _, error in parts]), errors, rtol=1e-10, atol=1e-14)
    summed = [torch.stack(g).sum(dim=0) for g in zip(*(batch.gradients(loss) for loss, _ in parts), strict=True)]
    for ours, expected in zip(summed, batch.gradients(whole), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["c51", "hl_gauss", "dqn", "munchausen_dqn"])
def test_a_nan_in_one_row_shows_in_the_loss(name: str):
    agent = make_agent(name)
    shape = (2, ACTIONS, *([51] if agent.distribution else []))
    labels = Labels(
        action=torch.tensor([0, 1]), reward=numbers(0, math.nan), discount=numbers(0.9, 0.9), weight=numbers(1, 1)
    )
    loss, _ = agent.loss(random(*shape), {p.letter: random(*shape, seed=1) for p in agent.passes}, labels, 2)
    assert not bool(loss.isfinite())
