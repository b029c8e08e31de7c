"""torchgpipe in the manner of its README: the network in a `GPipe` of two partitions, eight micro-batches.

https://github.com/kakaobrain/torchgpipe

One process. torchgpipe has a worker thread per *device*, and on a machine without GPUs both partitions lie on the one
device that there is: they run one after the other, each with all threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.peers.task import Step, Task, adam, frozen_copy, huber_loss, td_target


def torchgpipe_threads(task: Task, *, tuned: bool) -> Step:
    """One DQN update per call.

    As published, the activations of all micro-batches but the last are computed again for the backward pass. ``tuned``:
    they are kept, as every other contender keeps them; channels_last and the fused optimizer.
    """
    from torchgpipe import GPipe

    network, batch, m = task.make_network(tuned=tuned), task.make_batch(), task.num_microbatches
    checkpoint = "never" if tuned else "except_last"
    balance = [task.cut, len(network) - task.cut]
    target = GPipe(frozen_copy(network), balance, devices=["cpu", "cpu"], chunks=m, checkpoint=checkpoint).eval()
    model = GPipe(network, balance, devices=["cpu", "cpu"], chunks=m, checkpoint=checkpoint)
    optimizer = adam(model.parameters(), tuned=tuned)

    def step() -> Tensor:
        with torch.no_grad():
            labels = td_target(target(batch.next_obs), batch)
        optimizer.zero_grad()
        loss = huber_loss(model(batch.obs), batch.action, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step
