"""Updates per second of one process with all threads, on batches in memory, beside plain torch and TorchRL.

python -m experiments.learner_speed [--smoke]          about 4 minutes on 2 cores; run again, it goes on
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.peers.plain_torch import plain_torch
from experiments.peers.torchrl_loss import torchrl_loss
from mpdqn.bench.harness import interleave
from mpdqn.bench.single import learner_update, random_batch
from mpdqn.bench.speed import speed_table
from mpdqn.mesh import World
from mpdqn.networks import make_network
from mpdqn.records import Record

FRAMES, ACTIONS = (4, 84, 84), 6
WORKLOADS = (("nature", None, 32), ("nature", None, 256), ("impala", 2.0, 64))
PUBLISHED = ("plain torch", "TorchRL DQNLoss")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/learner_speed")
    """Folder of the records."""
    rounds: int = 5
    """Turns of each contender."""
    seconds: float = 3.0
    """Length of a turn."""
    seed: int = 0
    """Seed of weights and batches."""
    smoke: bool = False
    """One short round."""


def main(config: Config) -> None:
    """Measure every workload and write the table."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rounds, seconds = (1, 0.0) if config.smoke else (config.rounds, config.seconds)
    records: list[Record] = []
    with World.open() as world:
        for name, width, batch_size in WORKLOADS[: 1 if config.smoke else None]:
            batch = random_batch(FRAMES, ACTIONS, batch_size, config.seed)

            def network(name: str = name, width: float | None = width) -> torch.nn.Sequential:
                return make_network(name, FRAMES, ACTIONS, width=width, seed=config.seed)

            records += interleave(
                "learner_speed",
                f"{name}{f' ×{width:g}' if width else ''}, batch {batch_size}",
                {
                    "mpdqn": learner_update(network(), batch, FRAMES, world),
                    "plain torch": plain_torch(network(), batch, tuned=False),
                    "TorchRL DQNLoss": torchrl_loss(network(), batch, ACTIONS, tuned=False),
                    "plain torch, tuned": plain_torch(network(), batch, tuned=True),
                    "TorchRL DQNLoss, tuned": torchrl_loss(network(), batch, ACTIONS, tuned=True),
                },
                folder=config.out,
                rounds=rounds,
                seconds=seconds,
                seed=config.seed,
                settings={"threads": torch.get_num_threads(), "batch_size": batch_size, "smoke": config.smoke},
            )
    table = speed_table(records, "Updates per second on batches in memory", peers=PUBLISHED)
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
