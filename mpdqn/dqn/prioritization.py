"""`Prioritization`: how prioritised replay weighs its transitions (Schaul et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prioritization:
    """Transition i of a shard is drawn with P(i) = p_i / (V · Σ_k p_k), where p = (|δ| + ``epsilon``)^``alpha``.

    The sum runs over the shard; each of the V shards gives an equal part of a batch. The loss of a transition is
    weighed with (min_j P(j) / P(i))^β, where the minimum is over all shards; β goes linearly from ``beta`` to 1 over
    ``beta_updates`` updates (0: it stays).

    Raises:
        ValueError: for an exponent outside [0, 1], or another value that cannot be meant.
    """

    alpha: float = 0.5
    beta: float = 0.4
    beta_updates: int = 0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be between 0 and 1")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon} but must be above 0, or some are never drawn again")
        if self.beta_updates < 0:
            raise ValueError(f"beta_updates is {self.beta_updates} but must be at least 0")

    def beta_at(self, update: int) -> float:
        """β for the batch of ``update``, counted from 0."""
        if not self.beta_updates:
            return self.beta
        return self.beta + (1.0 - self.beta) * min(1.0, update / self.beta_updates)
