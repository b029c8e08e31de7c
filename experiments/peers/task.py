"""What every contender of `experiments.pipeline_peers` computes: one DQN update of one network on one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpdqn.bench.single import random_batch
from mpdqn.dqn.batch import Batch
from mpdqn.networks import MemoryFormat, make_network

FRAMES, ACTIONS = (4, 84, 84), 6

Step = Callable[[], Tensor | None]
"""One update; returns this rank's part of the batch's loss (a detached scalar), None where it has none."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The network, the batch, and how pipelines cut both.

    ``cut`` is the number of layers in the first of two stages, the same for every pipeline, so that no contender loses
    by another's choice. ``memory_format`` is that of contenders which choose one by measurement.
    """

    network: str
    batch_size: int
    num_microbatches: int
    cut: int
    memory_format: MemoryFormat
    seed: int

    def make_network(self, *, tuned: bool = False) -> nn.Sequential:
        """The network, ``tuned`` in channels_last; the same weights in every process."""
        network = make_network(self.network, FRAMES, ACTIONS, seed=self.seed)
        return network.to(memory_format=torch.channels_last) if tuned else network

    def make_batch(self) -> Batch:
        """The batch; the same in every process."""
        return random_batch(FRAMES, ACTIONS, self.batch_size, self.seed)


def frozen_copy(network: nn.Sequential) -> nn.Sequential:
    """The target network."""
    return copy.deepcopy(network).requires_grad_(False)


def td_target(target_q: Tensor, batch: Batch) -> Tensor:
    """The bootstrapped target: [B] from the target network's values [B, A] on the next observations."""
    return batch.reward + batch.discount * target_q.max(dim=1).values


def huber_loss(q: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """The mean Huber loss of the values ``q`` [B, A] of the actions taken."""
    return nn.functional.smooth_l1_loss(q.gather(1, action.unsqueeze(1)).squeeze(1), target)


def adam(parameters: Iterable[nn.Parameter], *, tuned: bool = False) -> torch.optim.Adam:
    """The optimizer of all of them, as in `experiments.peers.plain_torch`: torch's default, ``tuned`` the fused one."""
    return torch.optim.Adam(parameters, lr=6.25e-5, eps=1.5e-4, fused=True if tuned else None)
