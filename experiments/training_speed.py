"""Agent steps per second while training DQN on Pong, beside TorchRL's, Stable-Baselines3's and CleanRL's own trainers.

Nature network, uniform replay, batches of 32, an update for every four agent steps; besides, collection with a policy
alone. Each contender has a process of its own with all threads; they take turns.

bars: mpdqn trains at 1.5 × the best published peer; it collects 2,300 agent steps/s, and 0.85 of the bare loop

python -m experiments.training_speed [--smoke]          about 12 minutes on 2 cores; run again, it goes on
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from experiments.peers.bare_loop import bare_loop
from experiments.peers.train_cleanrl import cleanrl_training
from experiments.peers.train_mpdqn import mpdqn_collection, mpdqn_training
from experiments.peers.train_sb3 import sb3_training
from experiments.peers.train_torchrl import torchrl_collection, torchrl_training
from mpdqn.bench.harness import Isolated, interleave
from mpdqn.bench.speed import speed_table
from mpdqn.bench.tables import summarize
from mpdqn.records import Record

PUBLISHED = ("TorchRL dqn_atari", "SB3 DQN", "CleanRL dqn_atari")
COLLECTION_PEERS = ("bare loop", "TorchRL collector")
TRAINING, COLLECTION = "training", "collection with a policy"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/training_speed")
    """Folder of the records."""
    rounds: int = 5
    """Turns of each contender."""
    seconds: float = 5.0
    """Length of a turn."""
    warmup: int = 1_000
    """Transitions in each contender's replay before its first update."""
    seed: int = 0
    """Seed of the run."""
    smoke: bool = False
    """One short round."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """``make`` is called in the contender's process; ``packages`` are what must be installed for it."""

    make: Callable[[], Callable[[], None]]
    packages: tuple[str, ...] = ()

    def missing(self) -> tuple[str, ...]:
        """Those of its packages that are not installed."""
        return tuple(package for package in self.packages if importlib.util.find_spec(package) is None)


def training(steps: int, warmup: int, scratch: str) -> dict[str, Contender]:
    """All trainers by name, in the order of their turns; ``scratch`` is a folder for a buffer of up to 2.3 GB."""
    sb3 = functools.partial(sb3_training, steps=steps, warmup=warmup)
    cleanrl = functools.partial(cleanrl_training, steps=steps, warmup=warmup)
    torchrl = functools.partial(torchrl_training, steps=steps, warmup=warmup, scratch=scratch)
    mpdqn = functools.partial(mpdqn_training, steps=steps, warmup=warmup)
    return {
        "mpdqn": Contender(make=mpdqn),
        "TorchRL dqn_atari": Contender(make=torchrl, packages=("torchvision",)),
        "SB3 DQN": Contender(make=functools.partial(sb3, tuned=False), packages=("stable_baselines3", "cv2")),
        "CleanRL dqn_atari": Contender(
            make=functools.partial(cleanrl, tuned=False), packages=("stable_baselines3", "cv2")
        ),
        "SB3 DQN, tuned": Contender(make=functools.partial(sb3, tuned=True), packages=("stable_baselines3", "cv2")),
        "CleanRL dqn_atari, tuned": Contender(
            make=functools.partial(cleanrl, tuned=True), packages=("stable_baselines3",)
        ),
    }


def collection(steps: int) -> dict[str, Contender]:
    """All collectors by name, in the order of their turns."""
    return {
        "mpdqn": Contender(make=functools.partial(mpdqn_collection, steps=steps)),
        "bare loop": Contender(make=functools.partial(bare_loop, steps=steps)),
        "TorchRL collector": Contender(
            make=functools.partial(torchrl_collection, steps=steps), packages=("torchvision",)
        ),
    }


def with_threads(threads: int, make: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """What ``make`` returns, made after torch was given so many threads."""
    torch.set_num_threads(threads)
    return make()


def measure(config: Config, workload: str, contenders: Mapping[str, Contender], steps: int) -> tuple[Record, ...]:
    """The records of ``workload``, whose calls are ``steps`` agent steps long."""
    present = {name: contender for name, contender in contenders.items() if not contender.missing()}
    # On a busy machine a second thread is waited for more than it helps.
    threads = 1 if config.smoke else len(os.sched_getaffinity(0))
    processes: dict[str, Isolated] = {}
    try:
        for name, contender in present.items():
            processes[name] = Isolated(functools.partial(with_threads, threads, contender.make))
            processes[name].wait()  # else one would warm up while another is measured
        return interleave(
            "training_speed",
            workload,
            processes,
            folder=config.out,
            rounds=1 if config.smoke else config.rounds,
            seconds=0.0 if config.smoke else config.seconds,
            seed=config.seed,
            settings={
                "threads": threads,
                "agent_steps_per_call": steps,
                "warmup": config.warmup,
                "smoke": config.smoke,
            },
        )
    finally:
        for process in processes.values():
            process.close()


def agent_steps(record: Record) -> Record:
    """``record`` with agent steps in the place of calls."""
    calls, steps = record.values["calls_per_s"], record.settings["agent_steps_per_call"]
    assert isinstance(calls, float)
    assert isinstance(steps, int)
    return replace(record, values={"calls_per_s": calls * steps})


def bars(records: Iterable[Record]) -> tuple[str, ...]:
    """What the bars ask for and what was measured, one sentence each; a missed one says so."""
    rates: dict[tuple[str, str], dict[int, float]] = {}
    for record in map(agent_steps, records):
        rate = record.values["calls_per_s"]
        assert isinstance(rate, float)
        key = str(record.settings["workload"]), str(record.settings["contender"])
        rates.setdefault(key, {})[record.round] = rate
    sentences = []

    def bar(text: str, values: Iterable[float], least: float, digits: int) -> None:
        median = summarize(values).median
        sentences.append(
            f"bar {'met' if median >= least else 'missed'}: {text} {median:,.{digits}f}, at least {least:,.{digits}f}"
        )

    trained, collected = rates.get((TRAINING, "mpdqn")), rates.get((COLLECTION, "mpdqn"))
    published = [own for name in PUBLISHED if (own := rates.get((TRAINING, name)))]
    if trained and published:
        best = {r: max(own[r] for own in published) for r in trained}
        bar("mpdqn's training over the best published peer", (trained[r] / best[r] for r in best), 1.5, 2)
    if collected:
        bar("mpdqn's collection in agent steps/s", collected.values(), 2300, 0)
        if bare := rates.get((COLLECTION, "bare loop")):
            bar("mpdqn's collection over the bare loop", (collected[r] / bare[r] for r in collected), 0.85, 2)
    return tuple(sentences)


def main(config: Config) -> None:
    """Measure both workloads and write the table."""
    if config.smoke:
        config = replace(config, warmup=64)
    # 400 is the batch of TorchRL's collector; 1,024 are 16 steps of 64 games.
    train_steps, collect_steps = (80, 512) if config.smoke else (400, 1024)
    collectors = collection(collect_steps)
    with tempfile.TemporaryDirectory() as scratch:
        trainers = training(train_steps, config.warmup, scratch)
        records = (
            *measure(config, TRAINING, trainers, train_steps),
            *measure(config, COLLECTION, collectors, collect_steps),
        )
    table = speed_table(
        map(agent_steps, records), "Agent steps per second on Pong", peers=(*PUBLISHED, *COLLECTION_PEERS)
    )
    absent = {name: package for name, c in {**trainers, **collectors}.items() for package in c.missing()}
    notes = tuple(
        f"{name} left out: {package} is not installed, see the extra `peers`" for name, package in absent.items()
    )
    table = replace(table, notes=(*table.notes, *bars(records), *notes))
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
