"""`Munchausen`: the policy's own log-probability as a part of the reward (Vieillard et al. 2020, "Munchausen RL").

The policy is the softmax of Q/τ. Where an action has D dimensions and Q is the mean over them, it factorises into the
softmaxes of Q_d/(D·τ), log-probabilities and soft values are sums over d, and nothing has to enumerate A^D actions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Munchausen:
    """Scaling ``alpha`` of the log-policy, temperature ``tau``, and the lower end ``clip`` of τ·log π (l_0).

    Raises:
        ValueError: for a value that cannot be meant.
    """

    alpha: float = 0.9
    tau: float = 0.03
    clip: float = -1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha} but must be between 0 and 1; the paper's is 0.9")
        if not self.tau > 0:
            raise ValueError(f"tau is {self.tau} but a temperature must be above 0; the paper's is 0.03")
        if not self.clip < 0:
            raise ValueError(f"clip is {self.clip} but τ·log π is never above 0; the paper's l_0 is -1")

    def bonus(self, q: Tensor, action: Tensor) -> Tensor:
        """α·[τ·log π(a|s)] clipped to [clip, 0]: [B] float, of ``q`` [B, A] or [B, D, A] at ``action`` [B] or [B, D].

        ``q`` is the *target* network on the observation in which ``action`` was taken.
        """
        chosen = self.log_policy(q).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return self.alpha * _sum_over_dimensions(chosen).clamp(self.clip, 0)

    def soft_value(self, q: Tensor) -> Tensor:
        """Σ_a π(a|s)·(Q(s, a) − τ·log π(a|s)) = τ·log Σ_a exp(Q(s, a)/τ): [B] float of [B, A] or [B, D, A]."""
        return _sum_over_dimensions(self.tau * (self._parts(q) / self.tau).logsumexp(dim=-1))

    def log_policy(self, q: Tensor) -> Tensor:
        """τ·log π of each action, or of each dimension's actions: float, in the shape of ``q``."""
        return self.tau * (self._parts(q) / self.tau).log_softmax(dim=-1)

    def policy(self, q: Tensor) -> Tensor:
        """π of each action, or of each dimension's actions: float, in the shape of ``q``."""
        return (self._parts(q) / self.tau).softmax(dim=-1)

    def _parts(self, q: Tensor) -> Tensor:
        """What each dimension adds to Q: Q_d/D."""
        return q if q.dim() == 2 else q / q.shape[1]


def _sum_over_dimensions(terms: Tensor) -> Tensor:
    return terms if terms.dim() == 1 else terms.sum(dim=1)
