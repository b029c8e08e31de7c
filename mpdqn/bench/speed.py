"""The table of a speed comparison: contenders by workload, and their ratio to each published peer within the rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mpdqn.bench.tables import Table, spread, summarize
from mpdqn.records import Record


def speed_table(records: Iterable[Record], title: str, *, peers: Sequence[str]) -> Table:
    """One row for each workload and contender.

    Args:
        records: of `mpdqn.bench.harness.interleave`.
        title: heading of the table.
        peers: the contenders that every one is measured against, each in a column of its own.
    """
    rates: dict[str, dict[str, dict[int, float]]] = {}
    environments: dict[str, None] = {}
    for record in records:
        e = record.environment
        versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
        environments[
            f"{e.hardware}, {e.cores} cores; {versions}; commit {e.commit or 'unknown'}; command: {e.command}; "
            f"seed {record.seed}, {record.settings.get('threads')} threads"
        ] = None
        workload, contender = str(record.settings["workload"]), str(record.settings["contender"])
        rate = record.values["calls_per_s"]
        assert isinstance(rate, float)
        rates.setdefault(workload, {}).setdefault(contender, {})[record.round] = rate
    rows = []
    for workload, by_contender in rates.items():
        for contender, own in by_contender.items():
            against = []
            for peer in peers:
                ratios = [own[r] / other for r, other in by_contender.get(peer, {}).items() if r in own]
                against.append(f"{spread(summarize(ratios), 2)}×" if ratios and contender != peer else "–")
            rows.append((workload, contender, spread(summarize(own.values()), 1), *against))
    return Table(
        title=title,
        columns=("workload", "contender", "per second", *(f"× {peer}" for peer in peers)),
        rows=tuple(rows),
        notes=(
            f"median [min–max] of {_counts(rates)} interleaved rounds; ratios are taken within a round",
            *environments,
        ),
    )


def _counts(rates: dict[str, dict[str, dict[int, float]]]) -> str:
    counts = {len(rounds) for by_contender in rates.values() for rounds in by_contender.values()}
    return "–".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))
