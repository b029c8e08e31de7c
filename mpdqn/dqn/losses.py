"""The losses of the DQN family as pure tensor functions.

Every loss is a sum over the rows that are here, each term divided by the *global* batch size. Sums over micro-batches,
replicas and ranks then add up to the loss of the whole batch, whatever the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def td_target(reward: Tensor, discount: Tensor, next_target_q: Tensor, next_online_q: Tensor | None = None) -> Tensor:
    """The bootstrapped target r + γ·Q_target(s', a*).

    Args:
        reward: [B] float, the (n-step) return.
        discount: [B] float, γⁿ, 0 after a terminal state.
        next_target_q: [B, A] float, the target network on the next observation.
        next_online_q: [B, A] float, the online network on the next observation. Given, a* is its argmax (Double DQN,
            van Hasselt et al. 2016, eq. 4); otherwise a* is the target network's own (Mnih et al. 2015).

    Returns:
        [B] float.
    """
    selector = next_target_q if next_online_q is None else next_online_q
    best = selector.argmax(dim=1, keepdim=True)
    return reward + discount * next_target_q.gather(1, best).squeeze(1)


def td_error(q: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Q(s, a) − target: [B] float, from ``q`` [B, A] float, ``action`` [B] int64 and ``target`` [B] float."""
    return q.gather(1, action.unsqueeze(1)).squeeze(1) - target


def huber(error: Tensor, delta: float = 1.0) -> Tensor:
    """The Huber loss of each error (Mnih et al. 2015 call it error clipping): [B] -> [B].

    Quadratic, ½e², where |e| ≤ ``delta``; linear, delta·(|e| − ½delta), beyond.
    """
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def global_mean(terms: Tensor, weight: Tensor, global_batch_size: int) -> Tensor:
    """This rank's share of the weighted batch mean: Σ weight·terms / global_batch_size, a scalar."""
    return (terms * weight).sum() / global_batch_size
