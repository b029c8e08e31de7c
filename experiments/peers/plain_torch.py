"""A DQN update as one writes it in plain PyTorch, in the manner of CleanRL's ``dqn_atari.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from mpdqn.dqn.batch import Batch


def plain_torch(network: nn.Module, batch: Batch, *, tuned: bool) -> Callable[[], None]:
    """One DQN update on ``batch`` per call: Huber loss, Adam.

    As published: torch's default memory format and optimizer. ``tuned``: channels_last and the fused optimizer.
    """
    if tuned:
        network = network.to(memory_format=torch.channels_last)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=6.25e-5, eps=1.5e-4, fused=True if tuned else None)

    def update() -> None:
        with torch.no_grad():
            best = target(batch.next_obs).max(dim=1).values
            td_target = batch.reward + batch.discount * best
        q = network(batch.obs).gather(1, batch.action.unsqueeze(1)).squeeze(1)
        loss = nn.functional.smooth_l1_loss(q, td_target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return update
