"""Agent steps per second while training DQN on Pong, beside TorchRL, Stable-Baselines3 and CleanRL.

Nature network, uniform replay, batches of 32, an update for every four agent steps; besides, collection with a policy
alone. Each contender has a process of its own with all threads; they take turns. Stable-Baselines3's trainer is its
own; TorchRL's and CleanRL's scripts are rewritten here in their manner, with their settings. mpdqn has two rows: with
more games at a time, as is faster in one process, and with the defaults of ``mpdqn train``.

bars: mpdqn trains at 1.5 × the best published peer; it collects 2,300 agent steps/s, and 0.85 of the bare loop. A bar
is met only by both the median of the rounds' ratios and the ratio of the medians.

python -m experiments.training_speed [--smoke]          about 15 minutes on 2 cores; run again, it goes on
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from experiments.peers.bare_loop import bare_loop
from experiments.peers.train_cleanrl import cleanrl_training
from experiments.peers.train_mpdqn import (
    SHIPPED,
    TUNED_COLLECTION,
    TUNED_TRAINING,
    Games,
    mpdqn_collection,
    mpdqn_training,
)
from experiments.peers.train_sb3 import sb3_training
from experiments.peers.train_torchrl import torchrl_collection, torchrl_training
from mpdqn.bench.harness import Isolated, interleave
from mpdqn.bench.speed import speed_table
from mpdqn.bench.tables import Table, summarize
from mpdqn.records import Record

PUBLISHED = ("TorchRL dqn_atari", "SB3 DQN", "CleanRL dqn_atari")
COLLECTION_PEERS = ("bare loop", "TorchRL collector")
TUNED, DEFAULTS = "mpdqn", "mpdqn, defaults"
GAMES = (
    f"{TUNED}: training with {TUNED_TRAINING}, collection with {TUNED_COLLECTION} (shards × games), chosen for one "
    f"process; {DEFAULTS}: {SHIPPED}, as `mpdqn train` has unless told otherwise"
)
MANNER = (
    "SB3 DQN is Stable-Baselines3's own trainer; TorchRL dqn_atari and CleanRL dqn_atari are rewritten here in the "
    "manner of their scripts, with their settings; as published each plays one game, tuned SB3 plays 4 at a time and "
    f"tuned CleanRL 8; the bare loop plays {TUNED_COLLECTION.shards * TUNED_COLLECTION.per_shard}"
)
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


def training(steps: int, warmup: int, scratch: str, tuned: Games) -> dict[str, Contender]:
    """All trainers by name, in the order of their turns; ``scratch`` is a folder for a buffer of up to 2.3 GB."""
    sb3 = functools.partial(sb3_training, steps=steps, warmup=warmup)
    cleanrl = functools.partial(cleanrl_training, steps=steps, warmup=warmup)
    torchrl = functools.partial(torchrl_training, steps=steps, warmup=warmup, scratch=scratch)
    mpdqn = functools.partial(mpdqn_training, steps=steps, warmup=warmup)
    return {
        TUNED: Contender(make=functools.partial(mpdqn, games=tuned)),
        DEFAULTS: Contender(make=functools.partial(mpdqn, games=SHIPPED)),
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


def collection(steps: int, tuned: Games) -> dict[str, Contender]:
    """All collectors by name, in the order of their turns."""
    return {
        TUNED: Contender(make=functools.partial(mpdqn_collection, steps=steps, games=tuned)),
        DEFAULTS: Contender(make=functools.partial(mpdqn_collection, steps=steps, games=SHIPPED)),
        "bare loop": Contender(make=functools.partial(bare_loop, steps=steps, games=tuned)),
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
                "games": GAMES,
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
    return tuple(sentence for name in (TUNED, DEFAULTS) for sentence in _bars_of(name, rates))


def _bars_of(name: str, rates: Mapping[tuple[str, str], Mapping[int, float]]) -> Iterable[str]:
    """Yield the sentences about one row of mpdqn."""
    trained, collected = rates.get((TRAINING, name)), rates.get((COLLECTION, name))
    published = [own for peer in PUBLISHED if (own := rates.get((TRAINING, peer)))]
    if trained and published:
        yield _bar(f"{name}'s training over the best published peer", trained, published, 1.5)
    if collected:
        median, least = summarize(collected.values()).median, 2300
        met = "met" if median >= least else "missed"
        yield f"bar {met}: {name}'s collection in agent steps/s {median:,.0f}, at least {least:,}"
        if bare := rates.get((COLLECTION, "bare loop")):
            yield _bar(f"{name}'s collection over the bare loop", collected, [bare], 0.85)


def _bar(text: str, own: Mapping[int, float], peers: Sequence[Mapping[int, float]], least: float) -> str:
    """Return a bar's sentence, the ratio being to the best of ``peers``."""
    of_rounds = summarize(own[r] / max(peer[r] for peer in peers) for r in own).median
    of_medians = summarize(own.values()).median / max(summarize(peer.values()).median for peer in peers)
    met = "met" if min(of_rounds, of_medians) >= least else "missed"
    return (
        f"bar {met}: {text} {of_rounds:.2f} (median of the rounds' ratios) and {of_medians:.2f} (ratio of the "
        f"medians), both at least {least:.2f}"
    )


def training_table(records: Sequence[Record]) -> Table:
    """Return the table of both workloads, with what the rows are and the bars."""
    table = speed_table(
        map(agent_steps, records), "Agent steps per second on Pong", peers=(*PUBLISHED, *COLLECTION_PEERS)
    )
    measured = {record.settings["contender"] for record in records}
    games = GAMES if DEFAULTS in measured else f"{GAMES}, which these records did not measure"
    return replace(table, notes=(*table.notes, games, MANNER, *bars(records)))


def main(config: Config) -> None:
    """Measure both workloads and write the table."""
    if config.smoke:
        config = replace(config, warmup=64)
    # 400 is the batch of TorchRL's collector; 1,024 are 16 steps of 64 games.
    train_steps, collect_steps = (80, 128) if config.smoke else (400, 1024)
    # To load a game takes a quarter of a second.
    collectors = collection(collect_steps, SHIPPED if config.smoke else TUNED_COLLECTION)
    with tempfile.TemporaryDirectory() as scratch:
        trainers = training(train_steps, config.warmup, scratch, SHIPPED if config.smoke else TUNED_TRAINING)
        records = (
            *measure(config, TRAINING, trainers, train_steps),
            *measure(config, COLLECTION, collectors, collect_steps),
        )
    table = training_table(records)
    absent = {name: package for name, c in {**trainers, **collectors}.items() for package in c.missing()}
    notes = tuple(
        f"{name} left out: {package} is not installed, see the extra `peers`" for name, package in absent.items()
    )
    table = replace(table, notes=(*table.notes, *notes))
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
