"""The table of `experiments.schedule_overhead`, as a function of its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Record

Rounds = Mapping[int, float]


def overhead_table(
    records: Iterable[Record], pairs: Sequence[tuple[str, str]], floor: str, same: Mapping[str, str]
) -> Table:
    """One row for each pair of a schedule of ours and torch's; ratios are taken within a round.

    Args:
        records: of `mpdqn.bench.harness.interleave`, of one workload.
        pairs: contenders, ours and torch's; where one of them is empty, the other has no counterpart.
        floor: the contender that stands for the messages alone.
        same: schedules that were not measured, with the one that runs the very same actions.

    Raises:
        ValueError: if there are no records.
    """
    turns = list(records)
    if not turns:
        raise ValueError("there are 0 records; measure first")
    times: dict[str, dict[int, float]] = {}
    for record in turns:
        rate, m = record.values["calls_per_s"], record.settings["num_microbatches"]
        assert isinstance(rate, float)
        assert isinstance(m, int)
        times.setdefault(str(record.settings["contender"]), {})[record.round] = 1000 / (rate * m)
    rows = [_row(ours, torch, times.get(ours, {}), times.get(torch, {}), times[floor]) for ours, torch in pairs]
    rows.append((floor, _spread(times[floor]), NOTHING, NOTHING, NOTHING, NOTHING))
    settings = turns[-1].settings
    return Table(
        title=f"Time of a micro-batch (forward and backward) without work: {settings['workload']}, gloo",
        columns=("schedule", "ms", "torch's own", "ms", "÷ torch's own", f"÷ {floor}"),
        rows=tuple(rows),
        notes=(
            f"median [min–max] of {len(times[floor])} interleaved rounds; a step divided by m, on the slower rank; "
            "ratios are taken within a round",
            f"a stage is one Linear({settings['width']}, {settings['width']}), a micro-batch {settings['rows']} rows; "
            f"{settings['ranks']} ranks × {settings['threads']} thread in one pool",
            *(
                f"{name} runs the same actions as {other} where an agent has no pass to put into the gaps"
                for name, other in same.items()
            ),
            *_environments(turns),
        ),
    )


def _row(ours: str, torch: str, own: Rounds, its: Rounds, floor: Rounds) -> tuple[str, ...]:
    return (
        ours or NOTHING,
        _spread(own),
        torch.removeprefix("torch ") or NOTHING,
        _spread(its),
        _spread({r: own[r] / its[r] for r in own if r in its}),
        _spread({r: own[r] / floor[r] for r in own if r in floor}),
    )


def _spread(rounds: Rounds) -> str:
    return spread(summarize(rounds.values()), 2) if rounds else NOTHING


def _environments(records: Iterable[Record]) -> list[str]:
    notes: dict[str, None] = {}
    for record in records:
        e = record.environment
        versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
        notes[
            f"{e.hardware}, {e.cores} cores; {versions}; commit {e.commit or 'unknown'}; command: {e.command}; "
            f"seed {record.seed}"
        ] = None
    return list(notes)
