"""The table of `experiments.replay`, as a function of its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Record

MEMORY = "memory"
"""Workload of the records that hold bytes, not times."""


def replay_table(
    records: Iterable[Record],
    *,
    peer: str,
    recorded: Mapping[tuple[str, str], str],
    bars: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Table:
    """One row for each workload and contender, those of the memory first.

    Args:
        records: of `mpdqn.bench.harness.interleave`, with ``per_call`` among the settings, and those of the memory.
        peer: the contender that every one is measured against, within the rounds.
        recorded: (workload, contender) -> a figure from elsewhere.
        bars: workload -> what mpdqn is to reach.
        notes: what else to say below.
    """
    turns = list(records)
    memory = {str(r.settings["contender"]): r for r in turns if r.settings["workload"] == MEMORY}
    rates: dict[str, dict[str, dict[int, float]]] = {}
    for r in turns:
        workload, who, calls = str(r.settings["workload"]), str(r.settings["contender"]), r.values.get("calls_per_s")
        if workload != MEMORY:
            per_call = r.settings["per_call"]
            assert isinstance(calls, float)
            assert isinstance(per_call, int)
            rates.setdefault(workload, {}).setdefault(who, {})[r.round] = calls * per_call
    rows = []
    sizes = {who: _gib(record) for who, record in memory.items()}
    for who, size in sizes.items():
        ratio = f"{size / sizes[peer]:.3f}×" if peer in sizes and who != peer else NOTHING
        rows.append((MEMORY, who, f"{size:.2f}", ratio, _bar(bars, MEMORY, who), recorded.get((MEMORY, who), NOTHING)))
    for workload, by_contender in rates.items():
        yardstick = by_contender.get(peer, {})
        for who, own in by_contender.items():
            ratios = [own[r] / other for r, other in yardstick.items() if r in own]
            rows.append(
                (
                    workload,
                    who,
                    spread(summarize(own.values()), 0),
                    f"{spread(summarize(ratios), 2)}×" if ratios and who != peer else NOTHING,
                    _bar(bars, workload, who),
                    recorded.get((workload, who), NOTHING),
                )
            )
    rounds = sorted({len(own) for by_contender in rates.values() for own in by_contender.values()})
    return Table(
        title="Replay of Atari transitions (84 × 84, stacks of 4)",
        columns=("what", "contender, transitions held", "measured", f"× {peer}", "bar", "on record"),
        rows=tuple(rows),
        notes=(
            f"median [min–max] of {'–'.join(map(str, rounds))} interleaved rounds; ratios are taken within a round",
            "memory in GiB per million transitions, from the buffer's own tensors; the peers' is extrapolated from the "
            "bytes of one transition; insertion in transitions/s, 32 environments a call; samples in batches/s of 32 "
            "pairs (obs, next_obs)",
            "on record: the same peers on other hardware",
            *notes,
            *_environments(turns),
        ),
    )


def _gib(record: Record) -> float:
    value = record.values["bytes_per_transition"]
    assert isinstance(value, int | float)
    return value * 1e6 / 2**30


def _bar(bars: Mapping[str, str], workload: str, who: str) -> str:
    return bars.get(workload, NOTHING) if who.startswith("mpdqn") else NOTHING


def _environments(turns: Sequence[Record]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for r in turns:
        e = r.environment
        versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
        found[
            f"{e.hardware}, {e.cores} cores; {versions}, {r.settings['peers']}; commit {e.commit or 'unknown'}; "
            f"command: {e.command}"
        ] = None
    return tuple(found)
