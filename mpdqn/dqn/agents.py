"""Agents: which no-gradient passes an update needs, and the loss that it takes from them.

pass  network  frames      needed by
T     target   next_obs    every agent
D     online   next_obs    Double DQN (its argmax)
F/B   online   obs         the update itself, forward and backward
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mpdqn.dqn.losses import global_mean, huber, td_error, td_target


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One no-gradient pass over the batch's next observations, by the network that it names."""

    letter: str
    network: Literal["online", "target"]


TARGET = Pass(letter="T", network="target")
DOUBLE = Pass(letter="D", network="online")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the last stage needs of the transitions: all [B], see `mpdqn.dqn.batch.Batch`."""

    action: Tensor
    reward: Tensor
    discount: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A member of the DQN family.

    ``passes`` are the no-gradient passes of each update, in the order in which they run; ``huber_delta`` is where the
    loss turns linear.
    """

    name: str
    passes: tuple[Pass, ...]
    huber_delta: float = 1.0

    @property
    def letters(self) -> str:
        """The letters of the no-gradient passes, in their order."""
        return "".join(p.letter for p in self.passes)

    @property
    def frozen_letters(self) -> str:
        """The letters of the passes through the target network, which between two refreshes may run early."""
        return "".join(p.letter for p in self.passes if p.network == "target")

    def loss(
        self, q: Tensor, values: Mapping[str, Tensor], labels: Labels, global_batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """The loss of some rows of the batch.

        Args:
            q: [b, A] float, the online network on ``obs``, with its graph.
            values: the output [b, A] of each pass, by letter.
            labels: the same b rows.
            global_batch_size: transitions in the whole batch, over all micro-batches and replicas.

        Returns:
            the rows' share of the batch loss (a scalar with its graph) and their TD errors ([b] float, detached).
        """
        target = td_target(labels.reward, labels.discount, values["T"], values.get("D"))
        error = td_error(q, labels.action, target)
        return global_mean(huber(error, self.huber_delta), labels.weight, global_batch_size), error.detach()


def dqn() -> Agent:
    """DQN (Mnih et al. 2015, Nature 518)."""
    return Agent(name="dqn", passes=(TARGET,))


def double_dqn() -> Agent:
    """Double DQN (van Hasselt, Guez & Silver 2016)."""
    return Agent(name="double_dqn", passes=(TARGET, DOUBLE))


def make_agent(name: str) -> Agent:
    """The agent called ``name``: ``dqn`` or ``double_dqn``.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    known = {"dqn": dqn, "double_dqn": double_dqn}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown agent {name!r}; did you mean {nearest!r}? Known: {', '.join(known)}")
    return known[name]()
