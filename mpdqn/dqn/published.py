"""`Published`: named agents with the settings of their papers, or of the code that its authors published.

Three conversions hold throughout. Periods that a source counts in agent steps are divided by its agent steps per
update: a target network copied every 8,000 steps, with an update every 4, has ``target_period`` 2,000. Exploration is
counted in environment frames, 4 for each agent step on Atari. Where a source trained with RMSProp, which is not among
the learner's optimizers, Dopamine's Adam stands in and the docstring says so. Dopamine's ε starts to fall once learning
begins; here it falls from the first frame on.

Sources: Dopamine's configurations for Atari (Castro et al. 2018; the JAX agents), the papers named by each function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mpdqn.dqn import agents
from mpdqn.dqn.agents import Agent
from mpdqn.dqn.exploration import LinearEpsilon
from mpdqn.dqn.prioritization import Prioritization

FRAMES_PER_STEP = 4
"""Environment frames for each agent step on Atari (Mnih et al. 2015): the unit of ``epsilon``."""

ATARI_UPDATES = 200_000_000 // (FRAMES_PER_STEP * 4)
"""Updates in the 200 million frames of a whole Atari run, with one every 4 agent steps."""

NEVER = LinearEpsilon(start=0.0, end=0.0, decay_frames=0)
"""No ε-greedy exploration: noisy networks explore by themselves."""


TO_ONE_PERCENT = LinearEpsilon(end=0.01, decay_frames=250_000 * FRAMES_PER_STEP)
"""Dopamine's ε: from 1 to 0.01 over 250,000 agent steps."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """An agent and how it was trained. The defaults are Dopamine's DQN on Atari.

    Attributes:
        agent: the update rule.
        paper: who to cite.
        n_step: rewards in a return.
        discount: γ of one step.
        clip_rewards: whether rewards are clipped to [−1, 1] (not in evaluation).
        prioritization: of the replay; None samples uniformly.
        learning_rate, adam_eps: of Adam.
        max_grad_norm: bound of the gradient's norm over the whole network; inf: none.
        batch_size: transitions in an update.
        target_period: updates from one target refresh to the next.
        target_tau: τ of target ← τ·online + (1 − τ)·target.
        replay_period: agent steps per update.
        min_replay: transitions in the replay before learning begins.
        capacity: transitions that the replay holds.
        epsilon: exploration, by environment frames.
        evaluation_epsilon: ε of evaluation.
    """

    agent: Agent
    paper: str
    n_step: int = 1
    discount: float = 0.99
    clip_rewards: bool = True
    prioritization: Prioritization | None = None
    learning_rate: float = 6.25e-5
    adam_eps: float = 1.5e-4
    max_grad_norm: float = float("inf")
    batch_size: int = 32
    target_period: int = 2_000
    target_tau: float = 1.0
    replay_period: int = 4
    min_replay: int = 20_000
    capacity: int = 1_000_000
    epsilon: LinearEpsilon = TO_ONE_PERCENT
    evaluation_epsilon: float = 0.001


def dqn() -> Published:
    """DQN with Adam, as in Dopamine, and the Huber loss of Mnih et al. 2015.

    The paper's own optimizer is RMSProp; Dopamine's JAX agent takes the squared error: ``replace(agents.dqn(),
    huber_delta=float("inf"))`` is that, but for its factor 2.
    """
    return Published(agent=agents.dqn(), paper="Mnih et al. 2015; settings Castro et al. 2018 (Dopamine)")


def double_dqn() -> Published:
    """Double DQN with the settings of `dqn`, so that the two differ in nothing else (its paper used RMSProp)."""
    return Published(agent=agents.double_dqn(), paper="van Hasselt, Guez & Silver 2016; settings Dopamine")


def dueling_dqn() -> Published:
    """Double DQN with the dueling head: gradients clipped to norm 10, as in its paper; Adam instead of RMSProp."""
    return Published(agent=agents.dueling_dqn(), paper="Wang et al. 2016; settings Dopamine", max_grad_norm=10.0)


def prioritized_dqn() -> Published:
    """Double DQN with proportional prioritised replay, α 0.6 and β 0.4 to 1; a quarter of DQN's learning rate."""
    return Published(
        agent=agents.prioritized_dqn(),
        paper="Schaul et al. 2016; settings Dopamine",
        prioritization=Prioritization(alpha=0.6, beta=0.4, beta_updates=ATARI_UPDATES),
    )


def c51() -> Published:
    """C51 with its paper's learning rate, 2.5e-4, and Adam's ε of 0.01/32, as in Dopamine."""
    return Published(
        agent=agents.c51(),
        paper="Bellemare, Dabney & Munos 2017; settings Dopamine",
        learning_rate=2.5e-4,
        adam_eps=0.01 / 32,
    )


def noisy_dqn() -> Published:
    """NoisyNet-DQN: noise explores instead of ε, the rest as `dqn` (its paper used RMSProp)."""
    return Published(agent=agents.noisy_dqn(), paper="Fortunato et al. 2018; settings Dopamine", epsilon=NEVER)


def rainbow() -> Published:
    """Rainbow as in its paper's table 1: no ε, ω 0.5, β 0.4 to 1 over the run, n = 3, 80,000 frames before learning.

    ``evaluation_epsilon`` is that of Dopamine's full Rainbow.
    """
    return Published(
        agent=agents.rainbow(),
        paper="Hessel et al. 2018",
        n_step=3,
        prioritization=Prioritization(alpha=0.5, beta=0.4, beta_updates=ATARI_UPDATES),
        epsilon=NEVER,
    )


def dopamine_rainbow() -> Published:
    """Dopamine's Rainbow: C51, n = 3, prioritised replay with α 0.5 and a fixed β of 0.5, ε down to 0.01."""
    return Published(
        agent=agents.dopamine_rainbow(),
        paper="Castro et al. 2018 (Dopamine), after Hessel et al. 2018",
        n_step=3,
        prioritization=Prioritization(alpha=0.5, beta=0.5),
    )


def munchausen_dqn() -> Published:
    """M-DQN as in its authors' code: learning rate 5e-5, Adam's ε 0.01/32, Huber loss."""
    return Published(
        agent=agents.munchausen_dqn(),
        paper="Vieillard, Pietquin & Geist 2020",
        learning_rate=5e-5,
        adam_eps=0.01 / 32,
    )


def hl_gauss() -> Published:
    """HL-Gauss with 51 bins on [−10, 10], σ of 0.75 bins; optimizer as for `c51`, its paper's baseline."""
    return Published(
        agent=agents.hl_gauss(),
        paper="Farebrother et al. 2024; settings Dopamine's C51",
        learning_rate=2.5e-4,
        adam_eps=0.01 / 32,
    )


def decqn() -> Published:
    """DecQN as in its authors' code for the DeepMind Control Suite: batches of 256, n = 3, an update every 8 steps.

    32 samples per inserted transition and a batch of 256 make one update for every 8 agent steps; the target's period
    of 100 is counted in updates there, too. ε is constant. One critic, not the two whose mean the code can bootstrap
    from, and no random shifts of the frames.
    """
    return Published(
        agent=agents.decqn(),
        paper="Seyde et al. 2023",
        n_step=3,
        clip_rewards=False,
        prioritization=Prioritization(alpha=0.6, beta=0.2),
        learning_rate=1e-4,
        adam_eps=1e-8,
        max_grad_norm=40.0,
        batch_size=256,
        target_period=100,
        replay_period=8,
        min_replay=1_000,
        epsilon=LinearEpsilon(start=0.1, end=0.1, decay_frames=0),
        evaluation_epsilon=0.0,
    )


SETTINGS: dict[str, Callable[[], Published]] = {
    made.__name__: made
    for made in (
        *(dqn, double_dqn, dueling_dqn, prioritized_dqn, c51, noisy_dqn, rainbow, dopamine_rainbow),
        *(munchausen_dqn, hl_gauss, decqn),
    )
}
"""Every agent's published settings, by its name."""


def published(name: str) -> Published:
    """The agent called ``name`` with its published settings.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    agents.check_name(name)
    return SETTINGS[name]()


def brought_to(settings: Published, environment: str, field: str) -> Published:
    """``settings`` as they are on Atari, brought to another environment by its name and field.

    Robot control is left as it is: `decqn` was published there.
    """
    if environment.startswith("minatar"):
        return minatar(settings)
    if field == "driving":
        return car_racing(settings) if environment.startswith("car-racing") else highway(settings)
    return settings


def highway(settings: Published) -> Published:
    """``settings`` brought to highway-env, whose simulators make tens of decisions a second, not thousands.

    As in its authors' example of DQN on pictures (Leurent 2018, ``sb3_highway_dqn_cnn``): γ 0.8, an update for every
    decision after the first 200, a target copied every 50, 15,000 transitions, Adam at 5e-4, ε down to 0.05 over
    70,000.
    """
    return replace(
        settings,
        discount=0.8,
        learning_rate=5e-4,
        target_period=50,
        replay_period=1,
        min_replay=200,
        capacity=15_000,
        epsilon=replace(settings.epsilon, end=min(settings.epsilon.start, 0.05), decay_frames=70_000),
        clip_rewards=False,
    )


def car_racing(settings: Published) -> Published:
    """``settings`` brought to CarRacing, for which nothing is published: Atari's, over a tenth of the steps."""
    return replace(
        settings,
        min_replay=2_000,
        capacity=100_000,
        target_period=max(1, settings.target_period // 10),
        epsilon=replace(settings.epsilon, decay_frames=settings.epsilon.decay_frames // 10),
    )


def minatar(settings: Published) -> Published:
    """``settings`` brought to MinAtar, as Dopamine's MinAtar configurations change those of Atari.

    Learning begins after 1,000 transitions, the target is copied every 1,000 agent steps, 100,000 transitions are kept,
    and Adam has a learning rate of 2.5e-4 and an ε of 0.01/32. A step of MinAtar is one frame, so that ε falls over as
    many steps as before in a quarter of the frames. Rewards are 0 or ±1 already.
    """
    epsilon = replace(settings.epsilon, decay_frames=settings.epsilon.decay_frames // FRAMES_PER_STEP)
    return replace(
        settings,
        learning_rate=2.5e-4,
        adam_eps=0.01 / 32,
        target_period=1_000 // settings.replay_period,
        min_replay=1_000,
        capacity=100_000,
        clip_rewards=False,
        epsilon=epsilon,
    )
