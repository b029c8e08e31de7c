"""The losses of the DQN family as pure tensor functions.

Every loss is a sum over the rows that are here, each term divided by the *global* batch size. Sums over micro-batches,
replicas and ranks then add up to the loss of the whole batch, whatever the layout.

Values are [B, A], or [B, D, A] where an action has D dimensions; the value of such an action is the mean over its
dimensions (DecQN, Seyde et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor


def td_target(reward: Tensor, discount: Tensor, next_target_q: Tensor, next_online_q: Tensor | None = None) -> Tensor:
    """The bootstrapped target r + γ·Q_target(s', a*).

    Args:
        reward: [B] float, the (n-step) return.
        discount: [B] float, γⁿ, 0 after a terminal state.
        next_target_q: [B, A] or [B, D, A] float, the target network on the next observation.
        next_online_q: the same of the online network. Given, a* is its argmax (Double DQN, van Hasselt et al. 2016,
            eq. 4); otherwise a* is the target network's own (Mnih et al. 2015). Each dimension of an action has its
            own argmax.

    Returns:
        [B] float.
    """
    selector = next_target_q if next_online_q is None else next_online_q
    return reward + discount * value_of(next_target_q, selector.argmax(dim=-1))


def td_error(q: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Q(s, a) − target: [B] float, from ``q`` [B, A] or [B, D, A], ``action`` [B] or [B, D] int64, ``target`` [B]."""
    return value_of(q, action) - target


def value_of(q: Tensor, action: Tensor) -> Tensor:
    """Q(s, a) [B] float: ``q`` [B, A] float at ``action`` [B] int64, or the mean over d of [B, D, A] at [B, D]."""
    chosen = q.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return chosen if chosen.dim() == 1 else chosen.mean(dim=1)


def huber(error: Tensor, delta: float = 1.0) -> Tensor:
    """The Huber loss of each error (Mnih et al. 2015 call it error clipping): [B] -> [B].

    Quadratic, ½e², where |e| ≤ ``delta``; linear, delta·(|e| − ½delta), beyond.
    """
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """−Σ_k target_k · log softmax(logits)_k of each row: [B, K] float twice -> [B] float."""
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target ‖ softmax(logits)) of each row, without gradient: [B, K] float twice -> [B] float, at least 0.

    Computed in float64: a small divergence is a difference of two entropies, of which float32 leaves few digits. It is
    0 once a transition is predicted exactly, which makes it the priority of distributional agents (Hessel et al. 2018,
    "Rainbow").
    """
    with torch.no_grad():
        exact = target.double()
        terms = torch.xlogy(exact, exact) - exact * logits.double().log_softmax(dim=-1)
        return terms.sum(dim=-1).clamp(min=0).to(logits.dtype)


def global_mean(terms: Tensor, weight: Tensor, global_batch_size: int) -> Tensor:
    """This rank's share of the weighted batch mean: Σ weight·terms / global_batch_size, a scalar."""
    return (terms * weight).sum() / global_batch_size
