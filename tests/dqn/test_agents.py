"""Agents: their passes, heads and names, what they act on, and which switches they refuse together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mpdqn.bench.single import random_batch
from mpdqn.dqn import published as settings
from mpdqn.dqn.acting import ActionValues
from mpdqn.dqn.agents import AGENTS, Agent, Labels, make_agent
from mpdqn.dqn.distributions import Categorical, HLGauss
from mpdqn.dqn.exploration import LinearEpsilon
from mpdqn.dqn.losses import global_mean, huber, td_error
from mpdqn.dqn.munchausen import Munchausen
from mpdqn.dqn.published import SETTINGS, minatar, published
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network
from mpdqn.plan import Parallelism, Partition, Plan

NEXT_OBS, OBS = "next_obs", "obs"


@pytest.mark.parametrize(
    ("name", "passes", "frozen"),
    [
        ("dqn", [("T", "target", NEXT_OBS)], "T"),
        ("double_dqn", [("T", "target", NEXT_OBS), ("D", "online", NEXT_OBS)], "T"),
        ("rainbow", [("T", "target", NEXT_OBS), ("D", "online", NEXT_OBS)], "T"),
        ("munchausen_dqn", [("T", "target", NEXT_OBS), ("M", "target", OBS)], "TM"),
    ],
)
def test_the_passes_that_an_agent_needs(name: str, passes: list[tuple[str, str, str]], frozen: str):
    agent = make_agent(name)
    assert agent.name == name
    assert [(p.letter, p.network, p.frames) for p in agent.passes] == passes
    assert agent.letters == "".join(letter for letter, _, _ in passes)
    assert agent.frozen_letters == frozen
    assert agent.huber_delta == 1.0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("doubledqn", "double_dqn"),
        ("double-dqn", "double_dqn"),
        ("dqm", "dqn"),
        ("DQN", "dqn"),
        ("Rainbow", "rainbow"),
        ("hl-gauss", "hl_gauss"),
    ],
)
def test_an_unknown_agent_is_answered_with_the_nearest_name(name: str, nearest: str):
    for look_up in (make_agent, published):
        with pytest.raises(
            ValueError, match=f"unknown agent '{name}'; did you mean '{nearest}'. Known: dqn, double_dqn"
        ):
            look_up(name)


def test_every_agent_has_published_settings_under_its_own_name():
    assert list(SETTINGS) == list(AGENTS)
    assert len(AGENTS) == 11
    for name in AGENTS:
        assert published(name).agent == make_agent(name)
        assert make_agent(name).name == name
        assert hash(published(name)) == hash(published(name))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"munchausen": Munchausen(), "double": True}, "is Munchausen and Double, but"),
        ({"distribution": Categorical(), "branching": True}, "has a distribution and branches, but"),
        ({"distribution": HLGauss(), "branching": True, "double": True}, "has a distribution and branches, but"),
        ({"huber_delta": 0.0}, "huber_delta is 0.0 but must be above 0"),
    ],
)
def test_switches_without_meaning_together_are_refused(switches: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Agent(name="mine", **switches)


def test_every_other_combination_is_an_agent():
    for distribution in (None, Categorical(), HLGauss()):
        for munchausen in (None, Munchausen()):
            for branching in (False, True)[: 1 + (distribution is None)]:
                for double in (False, True)[: 1 + (munchausen is None)]:
                    made = Agent(
                        name="mine",
                        **{"distribution": distribution, "munchausen": munchausen, "noisy": True, "dueling": True},
                        **{"branching": branching, "double": double},
                    )
                    assert len(made.passes) == 1 + bool(munchausen) + double


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(num_atoms=1), "1 atoms or bins are no distribution; use at least 2"),
        (lambda: HLGauss(num_bins=0), "0 atoms or bins are no distribution"),
        (lambda: Categorical(v_min=3, v_max=3), "v_min 3 and v_max 3 are no interval"),
        (lambda: HLGauss(v_max=math.inf), "v_max inf are no interval"),
        (lambda: HLGauss(sigma_ratio=0), "sigma_ratio is 0 bins but must be above 0"),
        (lambda: Munchausen(tau=0), "tau is 0 but a temperature must be above 0"),
        (lambda: Munchausen(alpha=1.5), "alpha is 1.5 but must be between 0 and 1"),
        (lambda: Munchausen(clip=0), "clip is 0 but τ·log π is never above 0"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", AGENTS)
def test_the_network_of_an_agents_head_options_is_its_network(name: str):
    agent, dims = make_agent(name), 3
    network = make_network("minatar", (4, 10, 10), 6, fc=8, **agent.head_options(dims))
    output = network(torch.zeros(2, 4, 10, 10, dtype=torch.uint8))
    agent.check_output(tuple(output.shape[1:]))
    wanted = (2, dims, 6) if agent.branching else (2, 6)
    assert agent.action_values(output).shape == wanted
    assert agent.greedy(output).shape == wanted[:-1]
    assert agent.greedy(output).dtype is torch.int64


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("c51", (6,), r"'c51' needs a network with output \[b, A, 51\] but this one has \[b, 6\]; make_network"),
        ("c51", (6, 21), r"output \[b, A, 51\] but this one has \[b, 6, 21\]"),
        ("dqn", (6, 51), r"output \[b, A\] but this one has \[b, 6, 51\]"),
        ("decqn", (6,), r"output \[b, D, A\] but this one has \[b, 6\]"),
    ],
)
def test_a_network_of_another_agent_is_refused(name: str, shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        make_agent(name).check_output(shape)


def test_the_greedy_action_has_the_highest_expected_value_not_the_likeliest_atom():
    agent = Agent(name="mine", distribution=Categorical(num_atoms=3, v_min=-10, v_max=10))
    certain = torch.tensor([0.0, 9.0, 0.0])  # almost surely 0
    hopeful = torch.tensor([1.0, 0.0, 2.0])  # 10 more often than −10
    output = torch.stack([certain, hopeful]).unsqueeze(0)
    shares = hopeful.softmax(0)
    torch.testing.assert_close(
        agent.action_values(output)[0], torch.stack([torch.tensor(0.0), 10 * (shares[2] - shares[0])])
    )
    assert agent.greedy(output).tolist() == [1]


def test_acting_on_one_action_dimension_is_acting_on_none():
    agent = make_agent("decqn")
    frames = torch.randint(256, (5, 4, 10, 10), dtype=torch.uint8)
    for dims, wanted in ((1, (5, 6)), (2, (5, 2, 6))):
        network = make_network("minatar", (4, 10, 10), 6, fc=8, **agent.head_options(dims))
        values = ActionValues(network, agent)(frames)
        assert values.shape == wanted
        assert torch.equal(values.reshape(-1), network(frames).reshape(-1))
    c51 = make_agent("c51")
    network = make_network("minatar", (4, 10, 10), 6, fc=8, **c51.head_options())
    assert torch.equal(ActionValues(network, c51)(frames), c51.action_values(network(frames)))


# Published settings, as literals from their sources


def test_dopamines_periods_in_agent_steps_become_updates():
    for name in set(AGENTS) - {"decqn"}:
        made = published(name)
        assert (made.target_period * made.replay_period, made.min_replay, made.batch_size) == (8_000, 20_000, 32), name
        assert (made.discount, made.capacity, made.target_tau, made.clip_rewards) == (0.99, 1_000_000, 1.0, True), name


def test_settings_that_set_agents_apart():
    adam = {name: (published(name).learning_rate, published(name).adam_eps) for name in AGENTS}
    assert adam["dqn"] == adam["double_dqn"] == adam["rainbow"] == (6.25e-5, 1.5e-4)
    assert adam["c51"] == adam["hl_gauss"] == (2.5e-4, 3.125e-4)
    assert adam["munchausen_dqn"] == (5e-5, 3.125e-4)
    assert adam["decqn"] == (1e-4, 1e-8)
    assert [name for name in AGENTS if published(name).n_step == 3] == ["rainbow", "dopamine_rainbow", "decqn"]
    prioritized = {name: published(name).prioritization for name in AGENTS if published(name).prioritization}
    assert {name: (p.alpha, p.beta, p.beta_updates) for name, p in prioritized.items()} == {
        "prioritized_dqn": (0.6, 0.4, 12_500_000),
        "rainbow": (0.5, 0.4, 12_500_000),
        "dopamine_rainbow": (0.5, 0.5, 0),
        "decqn": (0.6, 0.2, 0),
    }
    assert {name: published(name).max_grad_norm for name in AGENTS if published(name).max_grad_norm < math.inf} == {
        "dueling_dqn": 10.0,
        "decqn": 40.0,
    }


def test_exploration_by_noise_needs_no_epsilon_and_the_others_fall_over_a_million_frames():
    for name in AGENTS:
        made = published(name)
        if made.agent.noisy:
            assert made.epsilon(0) == made.epsilon(10**9) == 0.0
        elif name == "decqn":
            assert made.epsilon(0) == made.epsilon(10**9) == 0.1
        else:
            assert made.epsilon == LinearEpsilon(start=1.0, end=0.01, decay_frames=1_000_000)


def test_minatar_settings_are_dopamines():
    small = minatar(settings.rainbow())
    assert (small.learning_rate, small.adam_eps, small.min_replay, small.capacity) == (2.5e-4, 3.125e-4, 1_000, 100_000)
    assert small.target_period * small.replay_period == 1_000
    assert small.n_step == 3
    assert minatar(settings.dqn()).epsilon.decay_frames == 250_000, "steps of one frame"
    changed = {
        f.name for f in dataclasses.fields(small) if getattr(small, f.name) != getattr(settings.rainbow(), f.name)
    }
    assert changed == {"learning_rate", "adam_eps", "target_period", "min_replay", "capacity", "clip_rewards"}


class Expected(Agent):
    """Expected SARSA under a softmax policy: the example of docs/agents.md."""

    def loss(
        self, q: torch.Tensor, values: Mapping[str, torch.Tensor], labels: Labels, global_batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        target = labels.reward + labels.discount * (values["T"].softmax(1) * values["T"]).sum(1)
        error = td_error(q, labels.action, target)
        return global_mean(huber(error), labels.weight, global_batch_size), error.detach()


def test_an_agent_of_ones_own_learns_like_the_others():
    with World.open("cpu", 10) as world:
        losses = []
        for cuts, m in (((), 1), ((4,), 4)):
            network = make_network("minatar", (4, 10, 10), 5, fc=8, seed=3).double()
            plan = Plan.stacked(
                Partition(boundaries=(0, *cuts, len(network))), Parallelism(pipeline=len(cuts) + 1, num_microbatches=m)
            )
            agent = Expected(name="expected")
            learner = Learner(
                network,
                mesh=Mesh(world, plan, agent.letters),
                agent=agent,
                batch_size=8,
                observation_shape=(4, 10, 10),
                config=LearnerConfig(target_period=1, learning_rate=1e-2),
            )
            batches = [random_batch((4, 10, 10), 5, 8, update) for update in range(3)]
            losses.append(
                [learner.learn(batch.to(torch.device("cpu"), torch.float64)).loss.item() for batch in batches]
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
