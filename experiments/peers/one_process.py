"""One process with all threads: `plain_torch`, with the loss of its first updates for the check."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.peers.plain_torch import plain_torch
from experiments.peers.task import Step, Task, frozen_copy, huber_loss, td_target


def one_process(task: Task, *, tuned: bool, checked: int) -> Step:
    """The update of `plain_torch`; the first ``checked`` calls also tell the loss that they are going to reduce."""
    network, batch = task.make_network(), task.make_batch()
    target = frozen_copy(network)
    update = plain_torch(network, batch, tuned=tuned)
    calls = 0

    def step() -> Tensor | None:
        nonlocal calls
        calls += 1
        loss = None
        if calls <= checked:
            with torch.no_grad():
                loss = huber_loss(network(batch.obs), batch.action, td_target(target(batch.next_obs), batch))
        update()
        return loss

    return step
