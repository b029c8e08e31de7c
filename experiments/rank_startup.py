"""Seconds until n ranks are ready, and their memory: each a new Python process, and forked from mpdqn's server.

    spawned           n processes, each of which imports torch and mpdqn, as torchrun has it
    forkserver, cold  a server imports them and forks n processes, as for the first pool of a program
    forkserver, warm  the server is there, as for every later pool

and the main job on two workers, in a pool and under torchrun: its time, and the peak of all its processes' memory.

bar: n ranks from a server are ready at most 0.5 s after one spawned process

python -m experiments.rank_startup [--smoke]          about 15 minutes on 2 cores; run again, it goes on
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from experiments.peers.startup_table import COLD, MAIN_JOBS, POOL, ROUNDS, WARM, bar, job_table, startup_table
from experiments.peers.startup_task import FORKED, SPAWNED, memory_of_tree
from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records

LOOK_S = 0.5
"""Seconds between two looks at the memory of the main job; four times as many in a smoke run, as looking takes time."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the experiment."""

    out: Path = Path("results/rank_startup")
    """Folder of the records."""
    rounds: int = ROUNDS
    """Number of rounds; each measures everything once."""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of ranks that are started, one after the other."""
    smoke: bool = False
    """One round, of one rank, with a main job of one layout."""


def main(config: Config) -> None:
    """Measure the rounds that are missing and write the tables."""
    rounds, ranks = (1, (1,)) if config.smoke else (config.rounds, config.ranks)
    config.out.mkdir(parents=True, exist_ok=True)
    path, environment = config.out / RECORDS, Environment.current()
    before = list(read_records(path)) if path.exists() else []
    done = {record.round for record in before if record.row == MAIN_JOBS[-1]}
    records = [record for record in before if record.round in done]
    path.write_text("".join(record.to_json() + "\n" for record in records))
    for number in tqdm([n for n in range(rounds) if n not in done], unit="round", file=sys.stderr):
        for row, settings, values in turns(ranks, config.smoke):
            record = Record(
                experiment="rank_startup",
                row=row,
                round=number,
                seed=0,
                settings={**settings, "smoke": config.smoke},
                values=values,
                environment=environment,
            )
            records.append(record)
            append_records(path, [record])
    records = [record for record in records if record.round < rounds]
    text = startup_table(records, notes=bar(records)).markdown() + "\n" + job_table(records).markdown()
    (config.out / "table.md").write_text(text)
    print(text)


def turns(ranks: tuple[int, ...], smoke: bool) -> Iterator[tuple[str, dict[str, Value], dict[str, Value]]]:
    """One round: each row, its settings and what was measured."""
    for num_ranks in ranks:
        for method, rows in ((SPAWNED, (SPAWNED,)), (FORKED, (COLD, WARM))):
            command = [sys.executable, "-m", "experiments.peers.startup_task", method, str(num_ranks)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{num_ranks} ranks, {method}, could not be started:\n{done.stderr}")
            for row, values in zip(rows, json.loads(done.stdout), strict=True):
                yield row, {"ranks": num_ranks}, values
    for row in MAIN_JOBS:
        yield row, {"ranks": 2}, main_job(row, smoke)


def main_job(row: str, smoke: bool) -> dict[str, Value]:
    """Run ``mpdqn compare`` on two workers of a pool, or of torchrun; its seconds and the peak of all its processes."""
    started = (
        ["-m", "mpdqn"] if row == POOL else ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mpdqn"]
    )
    layouts = ["dp2"] if smoke else ["single@1", "single@2", "dp2", "pp2-1f1b/m8", "pp2-td1f1b/m8"]
    command = [sys.executable, *started, "compare", "--smoke", "--layouts", *layouts]
    if smoke:
        command += ["--transitions", "64", "--rounds", "1"]
    else:
        command += ["--network", "resnet18", "--batch-size", "64", "--transitions", "512"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        begin, peak = time.monotonic(), 0
        process = subprocess.Popen(
            [*command, "--out", folder],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": folder},  # where torchrun leaves a folder
        )
        while process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(LOOK_S * (4 if smoke else 1))
        seconds = time.monotonic() - begin
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"the main job ended with {process.returncode}:\n{log.read()}")
    return {"job_s": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
