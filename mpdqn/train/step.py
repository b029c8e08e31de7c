"""`TrainStep`: what one round of training did; and `NotANumber`, which ends a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpdqn.actors import Episode


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What one round did; the counts are of the whole run so far and the same on every rank.

    ``transitions`` agent steps and ``frames`` environment frames of all environments, ``updates`` of the network, ε at
    the end of the round. ``losses`` and ``grad_norms`` are scalars, one for each update of this round, the same on
    every learner rank. ``episodes`` ended in this round on this rank's replica, known to the rank of its first stage,
    as are ``restarts``. ``actor_lag`` is how many updates behind its first batch the weights were that played it.
    """

    round: int
    transitions: int
    frames: int
    updates: int
    epsilon: float
    losses: tuple[Tensor, ...]
    grad_norms: tuple[Tensor, ...]
    episodes: tuple[Episode, ...]
    restarts: int
    actor_lag: int
    late_passes: int
    bytes_sent: int


class NotANumber(FloatingPointError):
    """The loss of an update is infinite or no number; the same on every rank."""
