"""The table of a comparison: a row for each layout, and below it all that one must know to read it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from mpdqn.bench.rows import Row, best_single, ratios, rows_of
from mpdqn.bench.tables import NOTHING, Table, decimals, spread, summarize
from mpdqn.learner import LearnerConfig
from mpdqn.records import Record

OVERSUBSCRIBED, STACKED, INDEPENDENT = "†", "‡", "§"

SPLIT_BACKWARD = ("zb_h1", "zbv", "tdzb")
"""Schedules with a backward in two parts."""

_LEGEND = {
    OVERSUBSCRIBED: "oversubscribed: more ranks than this machine has cores or devices for",
    STACKED: "all stages of a replica in one process",
    INDEPENDENT: "independent processes that exchange nothing, their transitions/s added: a yardstick, not a layout",
}


def compare_table(records: Iterable[Record]) -> Table:
    """The table of a comparison: a row for each layout, in the order in which they were measured."""
    rows = rows_of(records)
    reference = best_single(rows)
    return Table(
        title=f"Layouts compared: {heading(rows)}",
        columns=(
            *("layout", "schedule", "m", "ranks × threads", "transitions/s", "frames/s", "× best single"),
            *("bubble", "simulated", "sent MiB", "peak MiB", "grad. error"),
        ),
        rows=tuple(_cells(row, reference) for row in rows),
        notes=_notes(rows),
    )


def relative_table(records: Iterable[Record], against: str) -> Table:
    """Throughput of every layout, and its ratio to the row ``against`` within each round.

    Raises:
        ValueError: if ``against`` was not measured.
    """
    rows = rows_of(records)
    reference = next((row.speeds for row in rows if row.name == against), None)
    if reference is None:
        raise ValueError(f"{against!r} is not among the rows {', '.join(row.name for row in rows)}; measure it, too")
    return Table(
        title=f"Layouts beside {against}: {heading(rows)}",
        columns=("layout", "ranks × threads", "transitions/s", f"× {against}"),
        rows=tuple(
            (
                f"{row.name} {_marks(row)}".rstrip(),
                f"{row.count('ranks')} × {row.count('threads')}",
                spread(summarize(row.speeds.values()), 1),
                spread(summarize(ratios(row.speeds, reference)), 2),
            )
            for row in rows
        ),
        notes=_notes(rows),
    )


def heading(rows: Sequence[Row]) -> str:
    """What was trained, in a few words."""
    network, environment, batch, device = (_each(rows, k) for k in ("network", "environment", "batch_size", "device"))
    return f"{network} on {environment}, batch {batch}, {device}"


def hardware(rows: Sequence[Row]) -> str:
    """The machine, or machines, of the records."""
    environments = [record.environment for row in rows for record in row.rounds.values()]
    return _joined(f"{e.hardware}, {e.cores} core{'s' * (e.cores != 1)}, {e.memory_gib:g} GiB" for e in environments)


def _cells(row: Row, reference: Mapping[int, float]) -> tuple[str, ...]:
    speed, pace = summarize(row.speeds.values()), ratios(row.speeds, reference)
    frames = speed.median * row.count("frames_per_transition")
    pipelined = row.count("pipeline") > 1
    return (
        f"{row.name} {_marks(row)}".rstrip(),
        str(row.setting("schedule")) if pipelined else NOTHING,
        str(row.count("num_microbatches")),
        f"{row.count('ranks')} × {row.count('threads')}",
        spread(speed, decimals(speed.median)),
        f"{frames:.{decimals(frames)}f}",
        spread(summarize(pace), 2) if pace else NOTHING,
        *(_percent(row.known(key)) if pipelined else NOTHING for key in ("bubble_measured", "bubble_simulated")),
        _mib(row, "bytes_sent"),
        _mib(row, "peak_memory_bytes"),
        _error(row.known("gradient_error")),
    )


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    records = [record for row in rows for record in row.rounds.values()]
    environments = [record.environment for record in records]
    cuts = {
        f"cut {row.setting('boundaries')} for p·v = {row.count('pipeline') * row.count('virtual')}"
        for row in rows
        if row.count("pipeline") > 1
    }
    versions = dict.fromkeys(f"{name} {version}" for e in environments for name, version in e.versions.items())
    lengths = [len(row.rounds) for row in rows]
    rounds = "–".join(map(str, sorted({min(lengths), max(lengths)})))
    td_errors = [error for row in rows for error in row.known("td_error_error")]
    used = "".join(map(_marks, rows))
    single = (
        "over the fastest single process of the same round" if best_single(rows) else "no single process was measured"
    )
    return (
        f"{heading(rows)} ({_each(rows, 'backend')}, {_each(rows, 'memory_format')}{_precision(rows)}), "
        f"agent {_each(rows, 'agent')}, lookahead {_each(rows, 'lookahead')}, recompute {_each(rows, 'recompute')}; "
        + (", ".join(sorted(cuts)) or "not cut into stages"),
        f"{hardware(rows)}; {', '.join(versions)}; commit {_joined(e.commit for e in environments) or 'unknown'}; "
        f"command: {_joined(e.command for e in environments)}",
        f"seed {_joined(str(record.seed) for record in records)}; {rounds} interleaved rounds × {_each(rows, 'steps')} "
        "steps; transitions/s of the slowest rank, median [min–max] over the rounds; frames/s: environment frames "
        f"learned from, {_each(rows, 'frames_per_transition')} per transition; × best single: {single}",
        "bubble: share of a step, exchange and optimizer apart, in which a rank waits, mean over its ranks; simulated: "
        "the same for equal stages and free messages; sent per step and peak memory of rank 0 / rank 1, or of all "
        "(lowest–highest)",
        *(_late_note(row) for row in rows if any(row.known("late_pass_s"))),
        *_whole_backward_note(rows),
        "grad. error: ‖a − b‖₂ / ‖b‖₂ in float32 against the single process on the same batch"
        + (f"; the TD errors differ likewise by at most {_error(td_errors)}" if td_errors else ""),
        *(f"{mark} {text}" for mark, text in _LEGEND.items() if mark in used),
    )


def _precision(rows: Sequence[Row]) -> str:
    """Precision and compilation, with the rows of each where they differ; empty for records that do not say."""
    layouts: dict[str, list[str]] = {}
    for row in rows:
        layouts.setdefault(str(row.setting("precision", "")), []).append(row.name)
    if len(layouts) == 1:
        return "".join(f", {precision}" for precision in layouts if precision)
    return "".join(f"; {precision or 'unknown'}: {', '.join(names)}" for precision, names in layouts.items())


def _late_note(row: Row) -> str:
    """What a target refresh costs where passes run ahead: seen at the first update, when nothing had been announced."""
    late, step = (statistics.median(row.known(key)) for key in ("late_pass_s", "step_s"))
    period = int(str(row.setting("target_period", LearnerConfig().target_period)))
    return (
        f"{row.name}: passes that could not run ahead took {1e3 * late:.0f} ms in the first update; after each target "
        f"refresh, one in {period} updates, that would be {late / (late + step * period):.1e} of the time"
    )


def _whole_backward_note(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the note on rows whose compiled stages do not split the backward; none without such rows."""
    names = [
        row.name
        for row in rows
        if str(row.setting("precision", "")).endswith("compiled") and row.setting("schedule") in SPLIT_BACKWARD
    ]
    if not names:
        return ()
    return (
        f"{', '.join(names)}: a compiled stage's backward cannot be split, it runs whole where its first part stands; "
        "simulated is what the split would give",
    )


def _marks(row: Row) -> str:
    stacked = bool(row.setting("stacked")) and row.count("pipeline") > 1
    return (
        OVERSUBSCRIBED * bool(row.setting("oversubscribed"))
        + STACKED * stacked
        + INDEPENDENT * (row.count("copies") > 1)
    )


def _each(rows: Sequence[Row], key: str) -> str:
    return _joined(str(row.setting(key)) for row in rows)


def _joined(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * statistics.median(shares):.1f} %" if shares else NOTHING


def _error(errors: Sequence[float]) -> str:
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e, default=None)
    return NOTHING if worst is None else f"{worst:.1e}" if worst else "0"


def _mib(row: Row, key: str) -> str:
    """The value of each rank, in MiB: median over the rounds."""
    ranks = zip(*(row.per_rank(r, key) for r in row.rounds), strict=True)
    sizes = [statistics.median(values) / 2**20 for values in ranks]
    cells = [f"{size:.{min(1, decimals(10 * size))}f}" if size else "0" for size in sizes]
    if len(set(cells)) == 1:
        return cells[0]
    if len(cells) == 2:
        return " / ".join(cells)
    return "–".join(cells[sizes.index(extreme)] for extreme in (min(sizes), max(sizes)))
