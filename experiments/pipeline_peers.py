"""Updates per second of a DQN update over two ranks, beside other people's pipelines and data parallelism.

    pip install -e ".[peers]"                           torchgpipe and DeepSpeed, whose rows are else left out
    python -m experiments.pipeline_peers [--smoke]      about 14 minutes on 2 cores; run again, it goes on

Every contender computes the same update of the same network on the same batch, with all cores shared among its ranks.
Before anything is measured, its losses must be those of the single process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import tyro

from experiments.peers.contenders import CHECKED, TUNED, YARDSTICK, Contender, check_losses, contenders, versions
from experiments.peers.peers_table import failure, failures, peers_table
from experiments.peers.task import ACTIONS, FRAMES, Task
from experiments.peers.team import Team, TeamFailed
from mpdqn.bench.harness import interleave
from mpdqn.bench.single import random_batch
from mpdqn.networks import MemoryFormat, choose_memory_format, make_network, set_memory_format
from mpdqn.partition import balance, profile
from mpdqn.plan import Profile
from mpdqn.records import RECORDS, Value, append_records


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/pipeline_peers")
    """Folder of the records."""
    network: str = "resnet18"
    """A network of the zoo."""
    batch_size: int = 64
    """Transitions in the whole batch."""
    num_microbatches: int = 8
    """m of all pipelines."""
    rounds: int = 7
    """Turns of each contender."""
    seconds: float = 5.0
    """Length of a turn."""
    seed: int = 0
    """Seed of weights and batch."""
    smoke: bool = False
    """One short round of a small network, without those that are tuned."""


def main(config: Config) -> None:
    """Check every contender, measure, and write the table."""
    name, batch_size = ("nature", 16) if config.smoke else (config.network, config.batch_size)
    rounds, seconds = (1, 0.0) if config.smoke else (config.rounds, config.seconds)
    cores = len(os.sched_getaffinity(0))
    config.out.mkdir(parents=True, exist_ok=True)
    task = make_task(config, name, batch_size, max(1, cores // 2))
    everyone = contenders(task, cores)
    chosen = installed({who: c for who, c in everyone.items() if not (config.smoke and who.endswith(TUNED))})
    workload = f"{name}, batch {batch_size}"
    common: dict[str, Value] = {
        "batch_size": batch_size,
        "cut": task.cut,
        "memory_format": task.memory_format,
        "peers": versions(),
        "smoke": config.smoke,
    }
    with contextlib.ExitStack() as stack:
        teams = {who: Team(c.make, ranks=c.ranks, threads=c.threads) for who, c in chosen.items()}
        for team in teams.values():
            stack.callback(team.close)
        losses: dict[str, list[float]] = {}
        errors: dict[str, str] = {}
        for who, team in teams.items():
            try:
                _, losses[who] = team.updates(CHECKED)
            except TeamFailed as error:
                if who == YARDSTICK:
                    raise
                errors[who] = str(error)
                print(f"{who} could not run:\n", *traceback.format_exception(error), file=sys.stderr)
        check_losses(losses)
        append_records(
            config.out / RECORDS,
            [failure(w, e, workload=workload, seed=config.seed, settings=common) for w, e in errors.items()],
        )
        ready = {who: chosen[who] for who in losses}
        records = interleave(
            "pipeline_peers",
            workload,
            {who: teams[who] for who in ready},
            folder=config.out,
            rounds=rounds,
            seconds=seconds,
            seed=config.seed,
            settings=common
            | {
                "contenders": "; ".join(ready),
                "ranks": [c.ranks for c in ready.values()],
                "threads": [c.threads for c in ready.values()],
                "m": [c.num_microbatches for c in ready.values()],
            },
        )
    table = peers_table([*records, *failures(config.out / RECORDS, workload)])
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


def make_task(config: Config, name: str, batch_size: int, threads: int) -> Task:
    """The task, cut where `mpdqn compare` would cut it.

    The profile is kept in the folder, so that a run that goes on cuts alike.
    """
    path = config.out / f"profile-{name}-{batch_size}-{config.num_microbatches}.json"
    if not path.exists():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        network = make_network(name, FRAMES, ACTIONS, seed=config.seed)
        part = random_batch(FRAMES, ACTIONS, batch_size, config.seed).obs[: batch_size // config.num_microbatches]
        set_memory_format(network, choose_memory_format(network, part))
        path.write_text(profile(network, part, name=name, accumulate=config.num_microbatches > 1).to_json() + "\n")
        torch.set_num_threads(before)
    measured = Profile.from_json(path.read_text())
    return Task(
        network=name,
        batch_size=batch_size,
        num_microbatches=config.num_microbatches,
        cut=balance(measured, 2, forward_passes=2).boundaries[1],
        memory_format=cast(MemoryFormat, measured.memory_format),
        seed=config.seed,
    )


def installed(everyone: dict[str, Contender]) -> dict[str, Contender]:
    """Those contenders whose packages are there; the others are named."""
    for who, contender in everyone.items():
        if contender.missing():
            print(
                f'{who} is left out: {contender.package} is not installed; pip install -e ".[peers]" installs it',
                flush=True,
            )
    return {who: contender for who, contender in everyone.items() if not contender.missing()}


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
