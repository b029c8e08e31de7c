"""A small comparison in this very process, which tests can watch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mpdqn.bench.config import CompareConfig, check
from mpdqn.bench.trial import Trials
from mpdqn.cores import restore
from mpdqn.mesh import World
from mpdqn.networks import NetworkFunction
from mpdqn.records import RECORDS, Record, read_records

SMALL = {"batch_size": 8, "transitions": 24, "num_shards": 2, "envs_per_shard": 1, "rounds": 1, "steps": 1}


def compared(out: Path, network: str | NetworkFunction, **settings: Any) -> list[Record]:
    """The records of a comparison on one rank. The process has its cores and threads back afterwards."""
    layouts = settings.pop("layouts", ["pp2-td1f1b+stacked/m2"])
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    restore({max(cores)}, 1)  # on a busy machine a second thread is waited for more than it helps
    try:
        job = check(CompareConfig(**{"out": out, **SMALL, **settings}), network, layouts)
        with World.open("cpu", 60) as world:
            trials = Trials(world, job)
            trials.prepare()
            trials.run(out)
    finally:
        restore(cores, threads)
    return list(read_records(out / RECORDS))
