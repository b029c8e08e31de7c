"""The same state with `torch.save` and `torch.load`, in one file, as most training scripts do it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from experiments.peers.checkpoint_task import Task


def save_with_torch(task: Task, path: Path) -> float:
    """Write weights, target, optimizer and all replay to ``path``, and have them on the disk; the seconds that took."""
    begin = time.perf_counter()
    (stage,) = task.learner.stages
    state = {
        "online": stage.online.state_dict(),
        "target": stage.target.state_dict(),
        "optimizer": task.learner.optimizer.state_dict(),
        # Fields are views of records: as they are, all records would be written once for each field.
        "replay": {name: tensor.contiguous() for name, tensor in task.shards.state().items()},
    }
    torch.save(state, path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - begin


def load_with_torch(task: Task, path: Path) -> float:
    """Load what `save_with_torch` wrote; the seconds that took. Errors as `Task.load`."""
    before = task.fingerprint()
    task.spoil()
    begin = time.perf_counter()
    state = torch.load(path, weights_only=True)
    (stage,) = task.learner.stages
    stage.online.load_state_dict(state["online"])
    stage.target.load_state_dict(state["target"])
    task.learner.optimizer.load_state_dict(state["optimizer"])
    task.shards.load_state(state["replay"])
    seconds = time.perf_counter() - begin
    task.check(before, path)
    return seconds
