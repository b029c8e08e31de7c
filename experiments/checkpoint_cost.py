"""What a checkpoint costs: time of the steps beside it, seconds to save and to load, bytes; beside torch.save.

ResNet-101 with double DQN and a replay of 100,000 transitions, in one process with all threads. A round is

    quiet │ full, beside training │ quiet │ 2,000 transitions, incremental, beside training │ quiet │
    full, waited for; loaded │ 2,000 transitions, incremental, waited for; loaded │ torch.save, torch.load

bar: steps are at most 10 % slower while a checkpoint is written, its copying included

python -m experiments.checkpoint_cost [--smoke]          about 12 minutes on 2 cores; run again, it goes on

Needs 8 GiB of memory, and 5 GB of disk in --out while it runs.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from experiments.peers.checkpoint_table import (
    FULL,
    INCREMENTAL,
    PEER,
    QUIET,
    ROUNDS,
    TURNS,
    WAITED_FULL,
    WAITED_INCREMENTAL,
    bars,
    checkpoint_table,
)
from experiments.peers.checkpoint_task import BATCH, ENVIRONMENTS, Beside, Task
from experiments.peers.checkpoint_torch import load_with_torch, save_with_torch
from mpdqn.allocator import keep_freed_memory, release_freed_memory
from mpdqn.checkpoint.saver import Saved
from mpdqn.mesh import World
from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/checkpoint_cost")
    """Folder of the records, and of the checkpoints while they are measured."""
    rounds: int = ROUNDS
    """How often all of it is measured."""
    steps: int = 4
    """Updates of a quiet turn."""
    seed: int = 0
    """Seed of weights and frames."""
    smoke: bool = False
    """One round with a small network and little replay."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large what is checkpointed is: ``new`` transitions come between a checkpoint and the next."""

    network: str
    transitions: int
    new: int


def main(config: Config) -> None:
    """Measure the rounds that are missing and write the table."""
    size = Size(network="resnet101", transitions=100_000, new=2_000)
    if config.smoke:
        size = Size(network="nature", transitions=2_048, new=192)
    # On a busy machine a second thread is waited for more than it helps.
    threads = 1 if config.smoke else len(os.sched_getaffinity(0))
    settings: dict[str, Value] = {
        "network": size.network,
        "transitions": size.transitions,
        "new": size.new // ENVIRONMENTS * ENVIRONMENTS,
        "batch_size": BATCH,
        "steps": config.steps,
        "threads": threads,
        "smoke": config.smoke,
    }
    rounds = 1 if config.smoke else config.rounds
    config.out.mkdir(parents=True, exist_ok=True)
    whole = whole_rounds(config, settings)
    missing = [number for number in range(rounds) if number not in whole]
    if missing:
        torch.set_num_threads(threads)
        keep_freed_memory()
        measure(config, size, settings, missing)
    records = [r for r in read_records(config.out / RECORDS) if r.round < rounds]
    table = checkpoint_table(records, notes=bars(records))
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


def whole_rounds(config: Config, settings: Mapping[str, Value]) -> set[int]:
    """The rounds that the folder holds, those that were broken off taken out of it.

    Raises:
        ValueError: if it holds records of other settings, or of another machine.
    """
    path = config.out / RECORDS
    records = list(read_records(path)) if path.exists() else []
    here = Environment.current()
    for r in records:
        if r.seed != config.seed or dict(r.settings) | {"turn": None} != dict(settings) | {"turn": None}:
            raise ValueError(f"{path} holds seed {r.seed} and settings {dict(r.settings)}; choose another --out")
        if (r.environment.hardware, dict(r.environment.versions)) != (here.hardware, here.versions):
            raise ValueError(f"{path} holds records of another machine or other versions; choose another --out")
    turns = {
        number: {r.settings["turn"] for r in records if r.round == number} for number in {r.round for r in records}
    }
    whole = {number for number, own in turns.items() if own == set(TURNS)}
    if whole != set(turns):
        path.write_text("".join(r.to_json() + "\n" for r in records if r.round in whole))
    return whole


def measure(config: Config, size: Size, settings: Mapping[str, Value], rounds: list[int]) -> None:
    """Append the records of ``rounds`` to the folder.

    Raises:
        OSError: if there is too little space for the checkpoints.
    """
    scratch = config.out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    environment = Environment.current()
    try:
        scratch.mkdir()
        with World.open() as world:
            task = Task(world, size.network, transitions=size.transitions, new=size.new, seed=config.seed)
            task.quiet(1)  # the optimizer's state is there from the first update on
            needed, free = 3 * num_bytes(task), shutil.disk_usage(scratch).free
            if needed > free:
                raise OSError(
                    f"{needed / 1e9:.1f} GB are needed in {scratch} and {free / 1e9:.1f} GB are free; give another "
                    "--out or make space"
                )
            progress = tqdm(total=len(rounds) * len(TURNS), unit="turn", file=sys.stderr)
            for number in rounds:
                for turn, values in turns_of_round(task, config.steps, size.new, scratch):
                    record = Record(
                        experiment="checkpoint_cost",
                        row=turn,
                        round=number,
                        seed=config.seed,
                        settings={**settings, "turn": turn},
                        values=values,
                        environment=environment,
                    )
                    append_records(config.out / RECORDS, [record])
                    progress.update()
            progress.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def turns_of_round(task: Task, steps: int, new: int, scratch: Path) -> Iterator[tuple[str, dict[str, Value]]]:
    """One round: each turn's name and what was measured."""
    task.rewind()
    release_freed_memory()  # the first checkpoint of a run copies to new memory
    task.quiet(2)
    yield QUIET[0], {"step_s": task.quiet(steps)}
    folder = scratch / "beside"
    saver = task.saver(folder)
    yield FULL, beside(task.save_beside(saver, 1))
    yield QUIET[1], {"step_s": task.quiet(steps)}
    task.store(new)
    yield INCREMENTAL, beside(task.save_beside(saver, 2))
    yield QUIET[2], {"step_s": task.quiet(steps)}
    del saver
    shutil.rmtree(folder)

    task.rewind()
    release_freed_memory()
    folder = scratch / "waited"
    saver = task.saver(folder)
    for number, turn in enumerate((WAITED_FULL, WAITED_INCREMENTAL), start=1):
        save_s, saved = task.save(saver, number)
        check_s, load_s = task.load(folder)
        yield turn, {"save_s": save_s, "check_s": check_s, "load_s": load_s, **sizes(saved)}
        task.store(new if number == 1 else 0)
    del saver
    shutil.rmtree(folder)

    release_freed_memory()
    path = scratch / "one-file.pt"
    save_s = save_with_torch(task, path)
    yield PEER, {"save_s": save_s, "load_s": load_with_torch(task, path), "file_bytes": path.stat().st_size}
    path.unlink()


def beside(outcome: Beside) -> dict[str, Value]:
    """What is recorded of a checkpoint beside training."""
    return {
        "step_s": outcome.step_s,
        "total_s": outcome.total_s,
        "copying_s": outcome.saved.copying_s,
        "writing_s": outcome.saved.writing_s,
        **sizes(outcome.saved),
    }


def sizes(saved: Saved) -> dict[str, Value]:
    """Bytes that were written, and bytes of all frames that the checkpoint has."""
    assert saved.manifest is not None
    return {
        "tensor_bytes": saved.manifest.num_bytes,
        "frame_bytes": saved.new_row_bytes,
        "all_frame_bytes": saved.manifest.num_row_bytes,
    }


def num_bytes(task: Task) -> int:
    """Of a full checkpoint, about."""
    tensors = sum(tensor.nbytes for tensor in task.state().values())
    return tensors + sum(task.shards[v].frames.nbytes for v in task.shards.owned)


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
