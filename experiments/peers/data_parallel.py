"""torch's DistributedDataParallel in the manner of its tutorial: every rank has the network and a part of the batch.

https://docs.pytorch.org/tutorials/intermediate/ddp_tutorial.html
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from experiments.peers.task import Step, Task, adam, frozen_copy, huber_loss, td_target


def data_parallel(task: Task, *, tuned: bool) -> Step:
    """One DQN update per call; gradients are averaged over the ranks while the backward pass goes on.

    ``tuned``: channels_last and the fused optimizer.
    """
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = task.batch_size // ranks
    batch = task.make_batch().rows(rank * share, (rank + 1) * share)
    network = task.make_network(tuned=tuned)
    target = frozen_copy(network)
    model = DistributedDataParallel(network)
    optimizer = adam(model.parameters(), tuned=tuned)

    def step() -> Tensor:
        with torch.no_grad():
            labels = td_target(target(batch.next_obs), batch)
        optimizer.zero_grad()
        loss = huber_loss(model(batch.obs), batch.action, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach() / ranks

    return step
