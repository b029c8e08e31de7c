"""Agents: which no-gradient passes an update needs, and the loss that it takes from them.

pass  network  frames      needed by
T     target   next_obs    every agent
M     target   obs         Munchausen (its log-policy of the action taken)
D     online   next_obs    Double DQN (its argmax)
F/B   online   obs         the update itself, forward and backward

An `Agent` is a set of switches over one loss. Its published combinations, with the settings of their papers, are in
`mpdqn.dqn.published`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpdqn.dqn.distributions import Categorical, Distribution, HLGauss, expectation
from mpdqn.dqn.losses import cross_entropy, global_mean, huber, kl_divergence, td_error, td_target
from mpdqn.dqn.munchausen import Munchausen


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One no-gradient pass over a batch: the network ``network`` on the batch's ``frames``."""

    letter: str
    network: Literal["online", "target"]
    frames: Literal["obs", "next_obs"] = "next_obs"


TARGET = Pass(letter="T", network="target")
LOG_POLICY = Pass(letter="M", network="target", frames="obs")
DOUBLE = Pass(letter="D", network="online")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the last stage needs of the transitions: all [B], ``action`` also [B, D]; see `mpdqn.dqn.batch.Batch`."""

    action: Tensor
    reward: Tensor
    discount: Tensor
    weight: Tensor

    def rows(self, start: int, stop: int) -> Labels:
        """The rows ``start`` up to ``stop``, as views."""
        return Labels(
            action=self.action[start:stop],
            reward=self.reward[start:stop],
            discount=self.discount[start:stop],
            weight=self.weight[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A member of the DQN family.

    A network's *output* is, by row of the batch, [A] values; with a ``distribution`` of K atoms [A, K] logits; with
    ``branching`` over D action dimensions [D, A] values.

    Attributes:
        name: what tables call it.
        double: the online network chooses the action that the target network values (van Hasselt et al. 2016).
        dueling: the head has streams for value and advantages (Wang et al. 2016). The loss does not see it.
        noisy: all linear layers are noisy (Fortunato et al. 2018). The loss does not see it.
        distribution: learn a distribution by its cross-entropy, instead of a value by its Huber loss.
        munchausen: log-policy in the reward and a soft value in the target (Vieillard et al. 2020).
        branching: an action has D dimensions, Q is the mean over them (DecQN, Seyde et al. 2023).
        huber_delta: where the Huber loss turns linear; inf for ½ of the squared error.

    Raises:
        ValueError: for switches that have no meaning together.
    """

    name: str
    double: bool = False
    dueling: bool = False
    noisy: bool = False
    distribution: Distribution | None = None
    munchausen: Munchausen | None = None
    branching: bool = False
    huber_delta: float = 1.0

    def __post_init__(self) -> None:
        if self.munchausen and self.double:
            raise ValueError(
                f"agent {self.name!r} is Munchausen and Double, but Munchausen's target is a mean over all actions "
                "with no argmax that the online network could make; set one of them"
            )
        if self.distribution and self.branching:
            raise ValueError(
                f"agent {self.name!r} has a distribution and branches, but DecQN's value is a mean over dimensions, "
                "and a mean of random returns has other atoms than they have; set one of them"
            )
        if not self.huber_delta > 0:
            raise ValueError(f"huber_delta is {self.huber_delta} but must be above 0; inf is the squared error")

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The no-gradient passes of each update, in the order in which they run."""
        return (TARGET, *[LOG_POLICY] * bool(self.munchausen), *[DOUBLE] * self.double)

    @property
    def letters(self) -> str:
        """The letters of the no-gradient passes, in their order."""
        return "".join(p.letter for p in self.passes)

    @property
    def frozen_letters(self) -> str:
        """The letters of the passes through the target network, which between two refreshes may run early."""
        return "".join(p.letter for p in self.passes if p.network == "target")

    def head_options(self, action_dims: int = 1) -> dict[str, Any]:
        """What `mpdqn.networks.make_network` must be told for this agent.

        ``action_dims`` is D, the dimensions of the environment's actions; it matters only with ``branching``.
        """
        return {
            "head": "dueling" if self.dueling else "plain",
            "noisy": self.noisy,
            "num_atoms": self.distribution.num_atoms if self.distribution else 1,
            "branches": action_dims if self.branching else 0,
        }

    def check_output(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless a network whose output is ``shape`` by row of the batch can be this agent's."""
        atoms = (self.distribution.num_atoms,) if self.distribution else ()
        if len(shape) != 1 + self.branching + len(atoms) or shape[len(shape) - len(atoms) :] != atoms:
            wanted = ", ".join(["b", *["D"] * self.branching, "A", *map(str, atoms)])
            raise ValueError(
                f"agent {self.name!r} needs a network with output [{wanted}] but this one has "
                f"[{', '.join(map(str, ('b', *shape)))}]; make_network(…, **agent.head_options()) builds one"
            )

    def action_values(self, output: Tensor) -> Tensor:
        """Expected values [B, A], or [B, D, A] with ``branching``, float, of a network's output."""
        return expectation(self.distribution, output) if self.distribution else output

    def greedy(self, output: Tensor) -> Tensor:
        """The action of highest expected value: int64 [B], or [B, D] with ``branching``."""
        return self.action_values(output).argmax(dim=-1)

    def loss(
        self, q: Tensor, values: Mapping[str, Tensor], labels: Labels, global_batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """The loss of some rows of the batch.

        Args:
            q: output of the online network on ``obs`` for b rows, with its graph.
            values: output of each pass for the same rows, by letter.
            labels: the same b rows.
            global_batch_size: transitions in the whole batch, over all micro-batches and replicas.

        Returns:
            the rows' share of the batch loss (a scalar with its graph) and their errors ([b] float, detached), which
            become priorities: TD errors Q(s, a) − target, or KL(target ‖ prediction) where a distribution is learned
            (Hessel et al. 2018).
        """
        action = labels.action
        if self.branching and action.dim() == 1:  # an environment with one action dimension need not say so
            action = action.unsqueeze(1)
        reward = labels.reward
        if self.munchausen:
            reward = reward + self.munchausen.bonus(self.action_values(values["M"]), action)
        if self.distribution is None:
            error = td_error(q, action, self._target(reward, labels.discount, values))
            return global_mean(huber(error, self.huber_delta), labels.weight, global_batch_size), error.detach()
        if isinstance(self.distribution, Categorical):
            target = self.distribution.project(*self._target_distribution(reward, labels.discount, values))
        else:
            target = self.distribution.histogram(self._target(reward, labels.discount, values))
        logits = _of_action(q, action)
        rows = cross_entropy(target, logits)
        return global_mean(rows, labels.weight, global_batch_size), kl_divergence(target, logits)

    def _target(self, reward: Tensor, discount: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The number [b] that Q(s, a) should be."""
        next_q = self.action_values(values["T"])
        if self.munchausen:
            return reward + discount * self.munchausen.soft_value(next_q)
        return td_target(reward, discount, next_q, self.action_values(values["D"]) if self.double else None)

    def _target_distribution(
        self, reward: Tensor, discount: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Points [b, N] and masses [b, N] of the return that is bootstrapped from: N is K, or A·K under a policy.

        With Munchausen the next action is drawn from the policy, and each of its actions moves the atoms by its own
        −τ·log π, as the quantiles of M-IQN move (Vieillard et al. 2020).
        """
        assert self.distribution is not None
        masses, atoms = values["T"].softmax(dim=-1), self.distribution.support(values["T"])
        if self.munchausen:
            next_q = self.action_values(values["T"])
            points = (atoms - self.munchausen.log_policy(next_q).unsqueeze(-1)).flatten(1)
            masses = (self.munchausen.policy(next_q).unsqueeze(-1) * masses).flatten(1)
        else:
            masses, points = _of_action(masses, self.greedy(values["D" if self.double else "T"])), atoms.unsqueeze(0)
        return reward.unsqueeze(1) + discount.unsqueeze(1) * points, masses


def _of_action(output: Tensor, action: Tensor) -> Tensor:
    """[b, K] of ``output`` [b, A, K] at ``action`` [b] int64."""
    return output[torch.arange(len(action), device=action.device), action]


def dqn() -> Agent:
    """DQN (Mnih et al. 2015, Nature 518)."""
    return Agent(name="dqn")


def double_dqn() -> Agent:
    """Double DQN (van Hasselt, Guez & Silver 2016)."""
    return Agent(name="double_dqn", double=True)


def dueling_dqn() -> Agent:
    """Double DQN with the dueling head (Wang et al. 2016)."""
    return Agent(name="dueling_dqn", double=True, dueling=True)


def prioritized_dqn() -> Agent:
    """Double DQN, meant for prioritised replay (Schaul et al. 2016)."""
    return Agent(name="prioritized_dqn", double=True)


def c51() -> Agent:
    """C51 (Bellemare, Dabney & Munos 2017)."""
    return Agent(name="c51", distribution=Categorical())


def noisy_dqn() -> Agent:
    """NoisyNet-DQN (Fortunato et al. 2018)."""
    return Agent(name="noisy_dqn", noisy=True)


def rainbow() -> Agent:
    """Rainbow (Hessel et al. 2018); its n-step returns and prioritised replay are settings of the replay."""
    return Agent(name="rainbow", double=True, dueling=True, noisy=True, distribution=Categorical())


def dopamine_rainbow() -> Agent:
    """Dopamine's Rainbow (Castro et al. 2018): C51 with n-step returns and prioritised replay, without the rest."""
    return Agent(name="dopamine_rainbow", distribution=Categorical())


def munchausen_dqn() -> Agent:
    """M-DQN (Vieillard, Pietquin & Geist 2020)."""
    return Agent(name="munchausen_dqn", munchausen=Munchausen())


def hl_gauss() -> Agent:
    """DQN by classification, HL-Gauss (Farebrother et al. 2024)."""
    return Agent(name="hl_gauss", distribution=HLGauss())


def decqn() -> Agent:
    """DecQN (Seyde et al. 2023), with the Double argmax in each dimension, as its authors' code has it."""
    return Agent(name="decqn", double=True, branching=True)


AGENTS = {
    made.__name__: made
    for made in (
        *(dqn, double_dqn, dueling_dqn, prioritized_dqn, c51, noisy_dqn, rainbow, dopamine_rainbow),
        *(munchausen_dqn, hl_gauss, decqn),
    )
}
"""The agents that have a name."""


def make_agent(name: str) -> Agent:
    """The agent called ``name``, one of `AGENTS`.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    check_name(name)
    return AGENTS[name]()


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest known name, unless an agent is called ``name``."""
    if name not in AGENTS:
        nearest = difflib.get_close_matches(name.lower().replace("-", "_"), AGENTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown agent {name!r}; did you mean {nearest!r}? Known: {', '.join(AGENTS)}")
