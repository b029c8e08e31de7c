"""The tables and the bar of `experiments.rank_startup`, as functions of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from experiments.peers.startup_task import SPAWNED
from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Record

COLD, WARM = "forkserver, cold", "forkserver, warm"
WAYS = (SPAWNED, COLD, WARM)
POOL, TORCHRUN = "main job, in a pool", "main job, under torchrun"
MAIN_JOBS = (TORCHRUN, POOL)

LATER_S = 0.5
"""The bar: seconds by which n ranks from a server may be ready after one spawned process."""

ROUNDS = 3


def number(record: Record, name: str) -> float:
    """One number of a record."""
    value = record.values[name]
    assert isinstance(value, int | float)
    return float(value)


def ready_s(record: Record) -> float:
    """Seconds until the last rank was ready."""
    return number(record, "ready_s")


def rank_mb(record: Record) -> float:
    """Memory of one of the ranks, the server left out, in MB."""
    ranks = record.values["memory_bytes"]
    assert isinstance(ranks, list | tuple)
    return sum(ranks) / len(ranks) / 1e6


def memory_mb(record: Record) -> float:
    """Memory of all ranks and of their server, in MB."""
    ranks = record.values["memory_bytes"]
    assert isinstance(ranks, list | tuple)
    return (sum(ranks) + number(record, "server_bytes")) / 1e6


def startup_table(records: Iterable[Record], notes: Iterable[str] = ()) -> Table:
    """One row for each number of ranks: seconds until all are ready and memory of all, each way."""
    by_row = grouped(records)
    numbers = sorted({ranks for row, ranks in by_row if row in WAYS})

    def cell(way: str, ranks: int, of: Callable[[Record], float], digits: int) -> str:
        found = by_row.get((way, ranks), [])
        return spread(summarize(map(of, found)), digits) if found else NOTHING

    rows = [
        (
            str(ranks),
            *(cell(way, ranks, ready_s, 2) for way in WAYS),
            *(cell(way, ranks, memory_mb, 0) for way in WAYS[::2]),
            cell(WARM, ranks, rank_mb, 0),
        )
        for ranks in numbers
    ]
    return Table(
        title="Seconds until all ranks are ready, and memory of all of them",
        columns=(
            "ranks",
            *(f"{way}, s" for way in WAYS),
            *(f"{way.partition(',')[0]}, MB" for way in WAYS[::2]),
            "forkserver, MB a rank",
        ),
        rows=tuple(rows),
        notes=(
            *notes,
            "Ready: torch and all that a rank runs are imported. Memory: Pss (a page that n processes share counts "
            "1/n to each) when all are ready, that of the server with it.",
            "Median [range] of the rounds.",
        ),
    )


def bar(records: Iterable[Record]) -> tuple[str, ...]:
    """Return what the bar asks for and what was measured, a sentence for each way."""
    by_row = grouped(records)
    ones = {record.round: number(record, "ready_s") for record in by_row.get((SPAWNED, 1), [])}
    sentences = []
    for way in (COLD, WARM):
        later = {
            ranks: summarize(ready_s(record) - ones[record.round] for record in found)
            for (row, ranks), found in by_row.items()
            if row == way
        }
        verdict = "met" if all(summary.median <= LATER_S for summary in later.values()) else "missed"
        told = ", ".join(f"{spread(summary, 2)} s (n = {ranks})" for ranks, summary in sorted(later.items()))
        sentences.append(
            f"bar {verdict}: {way}: n ranks are ready {told} after one spawned process, at most {LATER_S} s"
        )
    return tuple(sentences)


def job_table(records: Iterable[Record]) -> Table:
    """The main job's seconds and memory, in a pool and under torchrun, whose ranks are processes of their own."""
    found = {row: [record for record in records if record.row == row] for row in MAIN_JOBS}
    rows = [
        (
            row,
            spread(summarize(number(record, "job_s") for record in own), 1),
            spread(summarize(number(record, "peak_bytes") / 1e6 for record in own), 0),
        )
        for row, own in found.items()
        if own
    ]
    return Table(
        title="The main job on two workers",
        columns=("", "seconds", "peak of all processes, MB"),
        rows=tuple(rows),
        notes=("Pss of all processes together, looked at twice a second. Median [range] of the rounds.",),
    )


def grouped(records: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """Return the records by row and number of ranks."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        ranks = record.settings["ranks"]
        assert isinstance(ranks, int)
        found.setdefault((record.row, ranks), []).append(record)
    return found
