"""Memory and speed of replay, beside TorchRL's shipped DQN and Stable-Baselines3.

    pip install -e ".[peers]"                    Stable-Baselines3, whose rows are else left out
    python -m experiments.replay [--smoke]       about 10 minutes on 2 cores; run again, it goes on

Each contender has a process of its own; they take turns. mpdqn is measured with as many transitions as the peers can
hold and with a million, where a peer would need 53 or 210 GiB. Needs 15 GiB of memory and 3 GiB of disk.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro

from experiments.peers.replay_mpdqn import BareFrames, VirtualShardsReplay
from experiments.peers.replay_sb3 import StableBaselinesReplay
from experiments.peers.replay_table import MEMORY, replay_table
from experiments.peers.replay_task import BATCH, ENVIRONMENTS, Memory, Replay
from experiments.peers.replay_torchrl import TorchRLReplay
from mpdqn import forkserver
from mpdqn.bench.harness import Isolated, interleave
from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records

INSERT, FILL, UNIFORM, PRIORITIZED = "insert", "insert into new memory", "sample uniformly", "sample by priority"
PEER = "TorchRL as shipped"
SHARDS = 4
BARS = {MEMORY: "≤ 6.7", INSERT: "≥ 60,000", FILL: "≥ 60,000", UNIFORM: "≥ 2,500", PRIORITIZED: "≥ 1,200"}
RECORDED = {MEMORY: "210", INSERT: "42,000", UNIFORM: "832"}
"""The shipped TorchRL example's figures when this project began: two cores of another machine."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/replay")
    """Folder of the records."""
    rounds: int = 7
    """Turns of each contender."""
    seconds: float = 3.0
    """Length of a turn."""
    small: int = 10_000
    """Transitions in every contender's buffer."""
    large: int = 1_000_000
    """Transitions in mpdqn's second buffer: is a sample as fast there?"""
    scratch: Path | None = None
    """Folder for TorchRL's memory-mapped files (default: the system's temporary folder)."""
    seed: int = 0
    """Seed of the records; the contenders' own streams do not matter here."""
    smoke: bool = False
    """One short round of small buffers."""


def contenders(config: Config, workload: str, scratch: Path) -> dict[str, Callable[[], Replay]]:
    """Who takes part in ``workload``: name -> its buffer."""
    small, large = config.small, config.large
    ours = {f"mpdqn, {large:,}": (large, SHARDS, workload == PRIORITIZED)}
    if workload == MEMORY:
        ours[f"mpdqn, {large:,}, with priorities"] = (large, SHARDS, True)
    else:
        ours[f"mpdqn, {small:,}"] = (small, SHARDS, workload == PRIORITIZED)
        if not config.smoke:
            ours[f"mpdqn, one shard, {small:,}"] = (small, 1, workload == PRIORITIZED)
    found: dict[str, Callable[[], Replay]] = {
        name: functools.partial(VirtualShardsReplay, size, shards, prioritized=prioritized)
        for name, (size, shards, prioritized) in ours.items()
    }
    for name, tuned in ((PEER, False), (f"TorchRL, bytes in memory, {small:,}", True)):
        if not (config.smoke and tuned):
            found[name] = functools.partial(
                TorchRLReplay, small, scratch / workload, tuned=tuned, prioritized=workload == PRIORITIZED
            )
    if workload != PRIORITIZED and has_sb3():
        found[f"Stable-Baselines3, {small:,}"] = functools.partial(StableBaselinesReplay, small)
    return found


def contender(make: Callable[[], Replay], workload: str, size: int) -> Callable[[], None]:
    """One call of ``workload`` on a buffer that is full."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    replay = make()
    for _ in range(-(-size // ENVIRONMENTS) + 8):
        replay.insert()
    return replay.insert if workload == INSERT else replay.sample


def processes_of(config: Config, workload: str, scratch: Path) -> dict[str, Callable[[], Callable[[], None]]]:
    """Who takes part in ``workload``: name -> what its process calls to get what it then calls again and again."""
    if workload == FILL:
        ours = functools.partial(VirtualShardsReplay, config.large, SHARDS, prioritized=False)
        bare = functools.partial(BareFrames, config.large)
        return {
            f"mpdqn, {config.large:,}": functools.partial(Filling, ours, config.large),
            f"frames alone, {config.large:,}": functools.partial(Filling, bare, config.large),
        }
    sizes = {f"mpdqn, {config.large:,}": config.large}
    return {
        who: functools.partial(contender, make, workload, sizes.get(who, config.small))
        for who, make in contenders(config, workload, scratch).items()
    }


class Filling:
    """Inserts into a new buffer, and into another one when that is full."""

    def __init__(self, make: Callable[[], Memory], size: int) -> None:
        self._make, self._size, self._left = make, size, 0

    def __call__(self) -> None:
        """One step of all environments."""
        if self._left <= 0:
            self._replay, self._left = self._make(), self._size
        self._replay.insert()
        self._left -= ENVIRONMENTS


def has_sb3() -> bool:
    """Whether Stable-Baselines3 is installed."""
    return importlib.util.find_spec("stable_baselines3") is not None


def measure_memory(
    config: Config, everyone: Mapping[str, Callable[[], Replay]], settings: Mapping[str, Value]
) -> list[Record]:
    """Bytes per transition of each contender, from its own tensors; what the folder holds already is not run again."""
    path = config.out / RECORDS
    kept = [r for r in (read_records(path) if path.exists() else ()) if r.settings["workload"] == MEMORY]
    known = {str(r.settings["contender"]) for r in kept}
    missing = {who: make for who, make in everyone.items() if who not in known}
    environment = Environment.current()
    sizes = {}
    if missing:
        forkserver.start()
        with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
            sizes = {who: pool.submit(bytes_per_transition, make).result() for who, make in missing.items()}
    for who, size in sizes.items():
        record = Record(
            experiment="replay",
            row=f"{MEMORY}: {who}",
            round=0,
            seed=config.seed,
            settings={"workload": MEMORY, **settings, "contender": who},
            values={"bytes_per_transition": size},
            environment=environment,
        )
        append_records(path, [record])
        kept.append(record)
    return kept


def bytes_per_transition(make: Callable[[], Replay]) -> float:
    """Of the buffer that ``make`` makes."""
    return make().bytes_per_transition


def main(config: Config) -> None:
    """Measure every workload and write the table."""
    rounds, seconds = (1, 0.0) if config.smoke else (config.rounds, config.seconds)
    if config.smoke:
        config = Config(out=config.out, seed=config.seed, scratch=config.scratch, small=320, large=640, smoke=True)
    config.out.mkdir(parents=True, exist_ok=True)
    missing = "" if has_sb3() else 'Stable-Baselines3 is not installed and left out; pip install -e ".[peers]" adds it'
    if missing:
        print(missing, file=sys.stderr)
    common: dict[str, Value] = {
        "small": config.small,
        "large": config.large,
        "threads": len(os.sched_getaffinity(0)),
        "peers": f"stable-baselines3 {metadata.version('stable-baselines3')}" if has_sb3() else "no stable-baselines3",
        "smoke": config.smoke,
    }
    with tempfile.TemporaryDirectory(prefix="replay-", dir=config.scratch) as scratch:
        records = measure_memory(config, contenders(config, MEMORY, Path(scratch)), common)
        for workload in (INSERT, FILL, UNIFORM, PRIORITIZED):
            with contextlib.ExitStack() as stack:
                processes = {}
                for who, make in processes_of(config, workload, Path(scratch)).items():
                    processes[who] = Isolated(make)
                    stack.callback(processes[who].close)
                records += interleave(
                    "replay",
                    workload,
                    processes,
                    folder=config.out,
                    rounds=rounds,
                    seconds=seconds,
                    seed=config.seed,
                    settings=common
                    | {"per_call": ENVIRONMENTS if workload in (INSERT, FILL) else 1, "batch_size": BATCH},
                )
    table = replay_table(
        records,
        peer=PEER,
        bars=BARS,
        recorded={(workload, PEER): figure for workload, figure in RECORDED.items()},
        notes=(
            f"mpdqn: {SHARDS} virtual shards × {ENVIRONMENTS // SHARDS} environments in one process unless it says one "
            f"shard; {PEER} holds {config.small:,}",
            "buffers are full, and the oldest transitions overwritten, unless it says new memory; frames alone: what "
            "it takes to write one frame a transition there, one after the other",
            *([missing] if missing else []),
        ),
    )
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
