"""`Learner` with Rainbow and Munchausen against loops in plain PyTorch, and what it refuses of agents and networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpdqn.bench.single import random_batch
from mpdqn.dqn.agents import Agent, make_agent
from mpdqn.dqn.batch import Batch
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.randomness import keyed_seed
from mpdqn.schedule import ActionTable

FRAMES, ACTIONS, BATCH, SEED = (4, 10, 10), 5, 16, 11
RULE: dict[str, Any] = {"target_period": 2, "learning_rate": 1e-2, "max_grad_norm": float("inf"), "seed": SEED}
WHOLE, HALVES = ((), 1, "gpipe", 0), ((4,), 4, "td1f1b", 1)
"""(cuts, m, schedule, lookahead)"""


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    with World.open("cpu", 10) as world:
        yield world


def network(**options: Any) -> nn.Sequential:
    return make_network("minatar", FRAMES, ACTIONS, fc=16, seed=3, **options).double()


def batch(update: int) -> Batch:
    drawn = random_batch(FRAMES, ACTIONS, BATCH, update)
    discount = torch.where(drawn.index % 4 == 0, 0.0, 0.9).double()
    return replace(drawn, reward=3 * drawn.reward.double(), discount=discount, weight=0.25 + drawn.index.double() / 9)


def build(
    world: World,
    agent: Agent,
    chain: nn.Sequential,
    layout: tuple[tuple[int, ...], int, str, int] = WHOLE,
    table: ActionTable | None = None,
) -> Learner:
    cuts, m, schedule, lookahead = layout
    parallelism = Parallelism(pipeline=len(cuts) + 1, num_microbatches=m, schedule=schedule)
    plan = Plan.stacked(Partition(boundaries=(0, *cuts, len(chain))), parallelism)
    return Learner(
        chain,
        mesh=Mesh(world, plan, agent.letters),
        agent=agent,
        batch_size=BATCH,
        observation_shape=FRAMES,
        config=LearnerConfig(lookahead=lookahead, **RULE),
        table=table,
    )


def learn(learner: Learner, updates: int) -> tuple[dict[str, Tensor], list[Tensor], list[float]]:
    """The weights, errors and losses of some updates."""
    errors, losses = [], []
    for now, upcoming in itertools.pairwise([batch(update) for update in range(updates + 1)]):
        step = learner.learn(now, upcoming if learner.config.lookahead else None)
        assert step.td_errors is not None
        errors.append(step.td_errors)
        losses.append(step.loss.item())
    return {name: p.detach() for name, p in learner.named_parameters()}, errors, losses


class PlainLoop:
    """Online and target weights, Adam, and a refresh every second update; the agents' targets are the tests' own."""

    def __init__(self, chain: nn.Sequential) -> None:
        self.chain = chain
        self.online = {name: p.detach().clone().requires_grad_() for name, p in chain.named_parameters()}
        self.target = {name: p.detach().clone() for name, p in chain.named_parameters()}
        self.optimizer = torch.optim.Adam(list(self.online.values()), lr=1e-2, eps=1.5e-4, foreach=False)

    def step(self, loss: Tensor, update: int) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if update % 2 == 1:
            self.target = {name: p.detach().clone() for name, p in self.online.items()}


def noised(weights: dict[str, Tensor], update: int, which: str) -> dict[str, Tensor]:
    """The weights of a network without noise that computes what the noisy one does: Fortunato et al. 2018, eq. 11."""
    plain = {name: w for name, w in weights.items() if not name.endswith("_sigma")}
    for name in [n.removesuffix(".bias_sigma") for n in weights if n.endswith(".bias_sigma")]:
        outputs, inputs = weights[f"{name}.weight"].shape
        draw = torch.Generator().manual_seed(keyed_seed("noise", SEED, update, which, name))
        f = torch.randn(inputs + outputs, generator=draw).double()
        f = f.sign() * f.abs().float().sqrt().double()
        plain[f"{name}.weight"] = weights[f"{name}.weight"] + weights[f"{name}.weight_sigma"] * (
            f[inputs:].unsqueeze(1) * f[:inputs].unsqueeze(0)
        )
        plain[f"{name}.bias"] = weights[f"{name}.bias"] + weights[f"{name}.bias_sigma"] * f[inputs:]
    return plain


@pytest.mark.parametrize("layout", [WHOLE, HALVES], ids=["single", "td1f1b"])
def test_rainbow_is_a_plain_loop(alone: World, layout: tuple[tuple[int, ...], int, str, int]) -> None:
    """One noise of the online network for both its passes, the target's own, and the update's wherever they run."""
    agent = make_agent("rainbow")
    options = agent.head_options()
    weights, errors, losses = learn(build(alone, agent, network(**options), layout), 5)

    loop, quiet = PlainLoop(network(**options)), network(**options | {"noisy": False})
    z, rows = torch.linspace(-10, 10, 51, dtype=torch.float64), range(BATCH)
    for update in range(5):
        b = batch(update)
        online, target = noised(loop.online, update, "online"), noised(loop.target, update, "target")
        with torch.no_grad():
            best = (functional_call(quiet, online, (b.next_obs,)).softmax(-1) @ z).argmax(1)
            masses = functional_call(quiet, target, (b.next_obs,)).softmax(-1)[rows, best]
            points = (b.reward.unsqueeze(1) + b.discount.unsqueeze(1) * z).clamp(-10, 10)
            place = (points + 10) / 0.4
            low = place.floor().clamp(max=49).long()
            projected = torch.zeros(BATCH, 51, dtype=torch.float64)
            projected.scatter_add_(1, low, masses * (low + 1 - place)).scatter_add_(1, low + 1, masses * (place - low))
        log_p = functional_call(quiet, online, (b.obs,))[rows, b.action].log_softmax(-1)
        loss = -(b.weight * (projected * log_p).sum(1)).mean()
        divergence = nn.functional.kl_div(log_p, projected, reduction="none").sum(1)
        torch.testing.assert_close(errors[update], divergence.detach(), rtol=1e-9, atol=1e-12)
        assert losses[update] == pytest.approx(loss.item(), rel=1e-10)
        loop.step(loss, update)
    for name, expected in loop.online.items():
        torch.testing.assert_close(weights[name], expected.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", [WHOLE, HALVES], ids=["single", "td1f1b"])
def test_munchausen_is_a_plain_loop(alone: World, layout: tuple[tuple[int, ...], int, str, int]) -> None:
    agent = make_agent("munchausen_dqn")
    weights, errors, losses = learn(build(alone, agent, network(), layout), 5)

    loop, chain = PlainLoop(network()), network()
    for update in range(5):
        b = batch(update)
        with torch.no_grad():
            now, after = (functional_call(chain, loop.target, (frames,)) for frames in (b.obs, b.next_obs))
            log_policy = (now / 0.03).log_softmax(1)
            bonus = 0.9 * (0.03 * log_policy.gather(1, b.action.unsqueeze(1)).squeeze(1)).clamp(min=-1)
            policy = (after / 0.03).softmax(1)
            soft = (policy * (after - 0.03 * policy.log())).sum(1)
        q = functional_call(chain, loop.online, (b.obs,)).gather(1, b.action.unsqueeze(1)).squeeze(1)
        error = q - (b.reward + bonus + b.discount * soft)
        loss = (b.weight * torch.where(error.abs() <= 1, error**2 / 2, error.abs() - 0.5)).mean()
        torch.testing.assert_close(errors[update], error.detach(), rtol=1e-10, atol=1e-12)
        assert losses[update] == pytest.approx(loss.item(), rel=1e-10)
        loop.step(loss, update)
    for name, expected in loop.online.items():
        torch.testing.assert_close(weights[name], expected.detach(), rtol=1e-9, atol=1e-11)


def test_another_seed_is_another_noise(alone: World) -> None:
    agent = make_agent("noisy_dqn")
    learners = [build(alone, agent, network(noisy=True)) for _ in range(2)]
    learners[1].config = replace(learners[1].config, seed=SEED + 1)
    first, second = (learn(learner, 1)[2] for learner in learners)
    assert first != second


def test_a_refresh_copies_weights_and_leaves_each_network_its_noise(alone: World) -> None:
    learner = build(alone, make_agent("noisy_dqn"), network(noisy=True))
    learn(learner, 2)
    (stage,) = learner.stages
    online, target = stage.online.get_submodule("fc"), stage.target.get_submodule("fc")
    assert torch.equal(online.weight_sigma, target.weight_sigma)
    assert not torch.equal(online.noise_in, target.noise_in)


# What it refuses


@pytest.mark.parametrize(("agent", "wanted"), [("c51", "b, A, 51"), ("decqn", "b, D, A")])
def test_a_network_without_the_agents_output(alone: World, agent: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"needs a network with output \[{wanted}\] but this one has \[b, 5\]"):
        build(alone, make_agent(agent), network())


def test_a_noisy_agent_on_a_network_without_noise_is_warned_of(alone: World) -> None:
    with pytest.warns(UserWarning, match="agent 'noisy_dqn' is noisy but the network has no NoisyLinear"):
        build(alone, make_agent("noisy_dqn"), network())


def test_target_passes_of_two_updates_in_one_step_cannot_both_have_their_noise(alone: World) -> None:
    agent = Agent(name="mine", munchausen=make_agent("munchausen_dqn").munchausen, noisy=True)
    built_in = build(alone, agent, network(noisy=True), HALVES).table
    assert built_in.ahead == "TM"
    table = _with_m_now(built_in)
    with pytest.raises(ValueError, match="runs T ahead but not M, which the same target network runs under the noise"):
        build(alone, agent, network(noisy=True), HALVES, table)
    build(alone, make_agent("munchausen_dqn"), network(), HALVES, table)  # without noise it is a step like others


def _with_m_now(table: ActionTable) -> ActionTable:
    """``table`` with its passes M over this batch, in front, instead of over the next."""
    lanes = tuple((*(a for a in lane if a.kind == "M"), *(a for a in lane if a.kind != "M")) for lane in table.lanes)
    return ActionTable(table.schedule, lanes, passes="M", ahead="T").check()


def test_actions_of_other_dimensions_than_the_networks(alone: World) -> None:
    agent = make_agent("decqn")
    learner = build(alone, agent, network(**agent.head_options(2)))
    with pytest.raises(
        ValueError, match=r"actions are \[16\] but the network's output is for actions of shape \[16, 2\]"
    ):
        learner.learn(batch(0))
    one = build(alone, agent, network(**agent.head_options(1)))
    plain = build(alone, make_agent("double_dqn"), network())
    for ours, expected in zip(learn(one, 2)[1], learn(plain, 2)[1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("agent", ["dqn", "c51"])
def test_a_nan_shows_in_the_loss_of_the_update(alone: World, agent: str) -> None:
    made = make_agent(agent)
    learner = build(alone, made, network(**made.head_options()))
    poisoned = replace(batch(0), reward=torch.where(torch.arange(BATCH) == 7, math.nan, batch(0).reward))
    assert not math.isfinite(learner.learn(poisoned).loss.item())
