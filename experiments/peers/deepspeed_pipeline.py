"""DeepSpeed's `PipelineModule` in the manner of its tutorial, on its CPU accelerator over gloo.

https://www.deepspeed.ai/tutorials/pipeline/

The engine knows one network; the target network gets an engine of its own, whose `eval_batch` is the target pass. The
stages are passed as two layers, so that DeepSpeed cuts between them. It sends activations as they lie in memory and
cannot send channels_last ones over gloo: only the optimizer is tuned. Where the machine has a compiler, DeepSpeed
builds its shared-memory operator when it first runs, which takes it about half a minute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from experiments.peers.task import Step, Task, adam, frozen_copy, huber_loss, td_target


def deepspeed_pipeline(task: Task, *, tuned: bool) -> Step:
    """One DQN update per call, over two ranks; ``tuned``: the fused optimizer."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    m, batch, network = task.num_microbatches, task.make_batch(), task.make_network()
    target = _engine(task, frozen_copy(network), trained=False, tuned=tuned)
    online = _engine(task, network, trained=True, tuned=tuned)

    def step() -> Tensor | None:
        q = target.eval_batch(_rows(m, batch.next_obs), compute_loss=False, reduce_output=None, bcast_loss=False)
        # Only the last stage has values, and only it reads labels.
        labels = td_target(torch.cat(q), batch) if online.is_last_stage() else batch.reward
        loss: Tensor = online.train_batch(_rows(m, batch.obs, batch.action, labels))
        return loss.detach() if online.is_last_stage() else None

    return step


def _engine(task: Task, network: nn.Sequential, *, trained: bool, tuned: bool) -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    stages = [network[: task.cut], network[task.cut :]]
    module = PipelineModule(stages, num_stages=2, loss_fn=_loss, partition_method="uniform")
    parameters = list(module.parameters())
    config = {
        "train_batch_size": task.batch_size,
        "train_micro_batch_size_per_gpu": task.batch_size // task.num_microbatches,
        "gradient_accumulation_steps": task.num_microbatches,
        "gradient_clipping": 0.0,  # its default clips to a norm of 1, which would be another update
        "steps_per_print": 1_000_000_000,
    }
    optimizer = adam(parameters, tuned=tuned) if trained else None
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=parameters, config=config)
    return engine


def _rows(num_microbatches: int, obs: Tensor, *labels: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """An iterator of micro-batches as the engine takes them: inputs, labels."""
    parts = list(zip(*(label.chunk(num_microbatches) for label in labels), strict=True)) or [()] * num_microbatches
    return zip(obs.chunk(num_microbatches), parts, strict=True)


def _loss(q: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    return huber_loss(q, *labels)
