"""The table of `experiments.kill_drill`, as a function of its records."""

from __future__ import annotations

from collections.abc import Iterable

from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Record

KILL, END = "kill", "end"
"""What a record tells of: one kill and the recovery from it, or how the run ended."""


def drill_table(records: Iterable[Record]) -> Table:
    """One row for each case."""
    by_case: dict[str, list[Record]] = {}
    for record in records:
        by_case.setdefault(record.row, []).append(record)
    rows = []
    for case, own in by_case.items():
        kills = [r.values for r in own if r.settings["what"] == KILL]
        ends = [r.values for r in own if r.settings["what"] == END]
        updates = [float(k["updates_repeated"]) for k in kills]  # type: ignore[arg-type]
        seconds = [float(k["recovery_s"]) for k in kills if k["recovery_s"] is not None]  # type: ignore[arg-type]
        rows.append(
            (
                case,
                str(len(kills)),
                str(sum(bool(k["while_writing"]) for k in kills)),
                str(sum(k["resumed_at"] == 0 for k in kills)),
                spread(summarize(updates), 0) if updates else NOTHING,
                spread(summarize(seconds), 1) if seconds else NOTHING,
                str(ends[0]["verdict"]) if ends else "not finished",
            )
        )
    return Table(
        title="A run whose ranks are killed, and the run that was left alone",
        columns=(
            *("run", "kills", "while writing", "before the first", "updates repeated", "seconds to recover"),
            "at the end",
        ),
        rows=tuple(rows),
        notes=(
            "kills: SIGKILL of a random rank at a random moment; while writing: as a checkpoint was being written; "
            "before the first: when there was none yet, so that the run began anew",
            "seconds to recover: from the start of the new process to the update at which the old one was killed; "
            "median [least–most]",
            "identical: final weights, and every byte of the checkpoint of the end: target network, optimizer, replay "
            "with its frames and priorities, games under way, episodes; and all rows of progress",
        ),
    )
