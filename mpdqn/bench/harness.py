"""`interleave`: contenders take turns, round after round, and every turn becomes a record.

    round 0  A B C      round 1  A B C      …      a ratio is taken within a round, where the machine was the same

A run that was stopped goes on where it stopped: rounds that are whole in the records file are not run again. A round
that was broken off is: its turns would lie hours apart.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from mpdqn.files import write_whole
from mpdqn.forkserver import forked
from mpdqn.progress_bar import ProgressBar
from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records

Update = Callable[[], None]
"""One update, or whatever is counted; it synchronises its device before it returns."""

ENDING_S = 5.0
"""Seconds between the end of a process and the moment when it is known how it ended, on a busy machine too."""


class Isolated:
    """A contender in a process of its own, so that its allocator and its threads are as it leaves them."""

    def __init__(self, make: Callable[[], Update]) -> None:
        """Start the process; ``make`` is called there and returns the update. It must be picklable."""
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = forked(_take_turns, make, theirs, name="mpdqn-contender")
        self._process.start()
        theirs.close()
        self._ready = False

    def wait(self) -> None:
        """Wait until ``make`` has returned; RuntimeError if it failed.

        Contenders whose making is work keep one another, and the first turns, from being disturbed by it.
        """
        if not self._ready:
            self._answer()
            self._ready = True

    def rate(self, seconds: float) -> float:
        """Calls per second in a turn; RuntimeError if the process has failed, with its error."""
        self.wait()
        with contextlib.suppress(BrokenPipeError):  # what ended it may still be read
            self._pipe.send(seconds)
        return self._answer()

    def _answer(self) -> float:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(ENDING_S)  # how it ended is known a moment later
            raise RuntimeError(f"a contender's process ended with code {self._process.exitcode}") from error
        if isinstance(answer, str):
            raise RuntimeError(f"a contender failed:\n{answer}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()


Contender = Update | Isolated


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
    environment = Environment.current()
    for r in kept:
        if r.seed != seed or dict(r.settings) | {"contender": None} != common | {"contender": None}:
            raise ValueError(
                f"{path} holds {workload!r} with seed {r.seed} and settings {dict(r.settings)}; choose another --out"
            )
        if (r.environment.hardware, dict(r.environment.versions)) != (environment.hardware, environment.versions):
            raise ValueError(f"{path} holds {workload!r} of another machine or other versions; choose another --out")
    begun = {k.round for k in kept}
    whole = {r for r in begun if {k.settings["contender"] for k in kept if k.round == r} == set(contenders)}
    if begun != whole:
        kept = [k for k in kept if k.round in whole]
        others = [r for r in read_records(path) if r.settings.get("workload") != workload]
        write_whole(path, "".join(r.to_json() + "\n" for r in (*others, *kept)))
    turns = [(r, name) for r in range(rounds) if r not in whole for name in contenders]
    for r, name in ProgressBar(turns, desc=workload, unit="turn"):
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


def _take_turns(make: Callable[[], Update], pipe: Connection) -> None:
    try:
        update = make()
        pipe.send(0.0)
        while True:
            pipe.send(_rate(update, pipe.recv()))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send(traceback.format_exc())


def _rate(contender: Contender, seconds: float) -> float:
    if isinstance(contender, Isolated):
        return contender.rate(seconds)
    contender()
    calls, begin = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - begin < seconds:
        contender()
        calls += 1
    return calls / (time.perf_counter() - begin)
