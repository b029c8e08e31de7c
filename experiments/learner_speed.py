"""Updates per second of one process with all threads, on batches in memory, beside plain torch and TorchRL.

Each contender has a process of its own; they take turns.

python -m experiments.learner_speed [--smoke]          about 6 minutes on 2 cores; run again, it goes on
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.peers.plain_torch import plain_torch
from experiments.peers.torchrl_loss import torchrl_loss
from mpdqn.bench.harness import Isolated, interleave
from mpdqn.bench.single import learner_update, random_batch
from mpdqn.bench.speed import speed_table
from mpdqn.networks import make_network
from mpdqn.records import Record

FRAMES, ACTIONS = (4, 84, 84), 6
WORKLOADS = (("nature", None, 32), ("nature", None, 256), ("impala", 2.0, 64))
PUBLISHED = ("plain torch", "TorchRL DQNLoss")
CONTENDERS = ("mpdqn", *PUBLISHED, *(f"{peer}, tuned" for peer in PUBLISHED))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/learner_speed")
    """Folder of the records."""
    rounds: int = 7
    """Turns of each contender."""
    seconds: float = 3.0
    """Length of a turn."""
    seed: int = 0
    """Seed of weights and batches."""
    smoke: bool = False
    """One short round."""


def contender(who: str, name: str, width: float | None, batch_size: int, seed: int) -> Callable[[], None]:
    """The update of ``who`` on one workload, with all threads."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = make_network(name, FRAMES, ACTIONS, width=width, seed=seed)
    batch = random_batch(FRAMES, ACTIONS, batch_size, seed)
    if who == "mpdqn":
        return learner_update(network, batch, FRAMES)
    if who.startswith("plain torch"):
        return plain_torch(network, batch, tuned=who.endswith("tuned"))
    return torchrl_loss(network, batch, ACTIONS, tuned=who.endswith("tuned"))


def main(config: Config) -> None:
    """Measure every workload and write the table."""
    rounds, seconds = (1, 0.0) if config.smoke else (config.rounds, config.seconds)
    records: list[Record] = []
    for name, width, batch_size in WORKLOADS[: 1 if config.smoke else None]:
        work = (name, width, batch_size, config.seed)
        processes = {who: Isolated(functools.partial(contender, who, *work)) for who in CONTENDERS}
        records += interleave(
            "learner_speed",
            f"{name}{f' ×{width:g}' if width else ''}, batch {batch_size}",
            processes,
            folder=config.out,
            rounds=rounds,
            seconds=seconds,
            seed=config.seed,
            settings={"threads": len(os.sched_getaffinity(0)), "batch_size": batch_size, "smoke": config.smoke},
        )
        for process in processes.values():
            process.close()
    table = speed_table(records, "Updates per second on batches in memory", peers=PUBLISHED)
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
