"""`interleave`: contenders take turns, round after round, and every turn becomes a record.

    round 0  A B C      round 1  A B C      …      a ratio is taken within a round, where the machine was the same

A run that was stopped goes on where it stopped: rounds that are whole in the records file are not run again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records

Contender = Callable[[], None]
"""One update, or whatever is counted; it synchronises its device before it returns."""


def interleave(
    experiment: str,
    workload: str,
    contenders: Mapping[str, Contender],
    *,
    folder: Path,
    rounds: int,
    seconds: float,
    seed: int,
    settings: Mapping[str, Value],
) -> tuple[Record, ...]:
    """Measure how many calls per second each contender makes, in turns of ``seconds`` after one call to warm up.

    Args:
        experiment: name of the experiment.
        workload: what all contenders do; with the contender's name it makes the record's row.
        contenders: by name, in the order of their turns.
        folder: its ``records.jsonl`` gets a record of each turn, with ``calls_per_s`` and ``workload``.
        rounds: how many rounds the file shall hold in the end.
        seconds: length of a turn; at least two calls are made.
        seed: seed of the run.
        settings: settings common to all turns.

    Returns:
        the records of this workload in the folder, those of earlier runs included.

    Raises:
        ValueError: if the folder holds records of the same workload with another seed or other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORDS
    common = {"workload": workload, **settings}
    kept = [r for r in (read_records(path) if path.exists() else ()) if r.settings.get("workload") == workload]
    for r in kept:
        if r.seed != seed or dict(r.settings) | {"contender": None} != common | {"contender": None}:
            raise ValueError(
                f"{path} holds {workload!r} with seed {r.seed} and settings {dict(r.settings)}; choose another --out"
            )
    environment = Environment.current()
    done = {(r.settings["contender"], r.round) for r in kept}
    turns = [(r, name) for r in range(rounds) for name in contenders if (name, r) not in done]
    for r, name in tqdm(turns, desc=workload, unit="turn", file=sys.stderr):
        record = Record(
            experiment=experiment,
            row=f"{workload}: {name}",
            round=r,
            seed=seed,
            settings={**common, "contender": name},
            values={"calls_per_s": _rate(contenders[name], seconds)},
            environment=environment,
        )
        append_records(path, [record])
        kept.append(record)
    return tuple(kept)


def _rate(contender: Contender, seconds: float) -> float:
    contender()
    calls, begin = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - begin < seconds:
        contender()
        calls += 1
    return calls / (time.perf_counter() - begin)
