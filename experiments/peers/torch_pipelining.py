"""torch.distributed.pipelining in the manner of its tutorial: a `PipelineStage` on each rank and a schedule.

https://docs.pytorch.org/tutorials/intermediate/pipelining_tutorial.html

The library knows one network and one pass; the target network gets a stage and a schedule without a loss of its own.
Labels are one tensor there, so that actions and TD targets travel to the loss as two columns. It sends activations as
they lie in memory, and gloo refuses channels_last ("input tensor has to be contiguous"): only the optimizer is tuned.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from experiments.peers.task import Step, Task, adam, frozen_copy, huber_loss, td_target


def torch_pipelining(task: Task, *, schedule: Literal["gpipe", "1f1b"], tuned: bool) -> Step:
    """One DQN update per call, over two ranks; ``tuned``: the fused optimizer."""
    dist.init_process_group("gloo")
    rank, device, m = dist.get_rank(), torch.device("cpu"), task.num_microbatches
    network, batch = task.make_network(), task.make_batch()
    module = network[: task.cut] if rank == 0 else network[task.cut :]
    build = ScheduleGPipe if schedule == "gpipe" else Schedule1F1B
    target = ScheduleGPipe(PipelineStage(frozen_copy(module), rank, 2, device), m)
    online = build(PipelineStage(module, rank, 2, device), m, loss_fn=_loss)
    optimizer = adam(module.parameters(), tuned=tuned)

    def step() -> Tensor | None:
        losses: list[Tensor] = []
        optimizer.zero_grad()
        if rank == 0:
            with torch.no_grad():
                target.step(batch.next_obs)
            online.step(batch.obs)
        else:
            with torch.no_grad():
                labels = td_target(target.step(), batch)
            online.step(target=torch.stack([batch.action.to(labels.dtype), labels], dim=1), losses=losses)
        optimizer.step()
        return torch.stack(losses).detach().mean() if losses else None

    return step


def _loss(q: Tensor, labels: Tensor) -> Tensor:
    return huber_loss(q, labels[:, 0].long(), labels[:, 1])
