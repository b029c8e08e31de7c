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
    environment = None
    for record in records:
        environment = record.environment
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
    where = f"{environment.hardware}, {environment.cores} cores" if environment else ""
    versions = ", ".join(f"{k} {v}" for k, v in environment.versions.items()) if environment else ""
    return Table(
        title=title,
        columns=("workload", "contender", "per second", *(f"× {peer}" for peer in peers)),
        rows=tuple(rows),
        notes=(
            f"median [min–max] of {len(next(iter(next(iter(rates.values())).values())))} interleaved rounds; "
            "ratios are taken within a round",
            where,
            versions,
        ),
    )
