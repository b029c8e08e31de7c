"""The table of `experiments.kill_drill`, as a function of its records."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.drill.moments import flag
from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Record

KILL, END = "kill", "end"
"""What a record tells of: one kill and the recovery from it, or how the run ended."""


def drill_table(records: Sequence[Record]) -> Table:
    """Return the table: one row for each case."""
    by_case: dict[str, list[Record]] = {}
    for record in records:
        by_case.setdefault(record.row, []).append(record)
    rows = []
    for case, own in by_case.items():
        kills = [r.values for r in own if r.settings["what"] == KILL]
        ends = [r.values for r in own if r.settings["what"] == END]
        updates = [float(k["updates_repeated"]) for k in kills]  # type: ignore[arg-type]
        at = [_fraction(r) for r in own if r.settings["what"] == KILL]
        seconds = [float(k["recovery_s"]) for k in kills if k["recovery_s"] is not None]  # type: ignore[arg-type]
        rows.append(
            (
                case,
                str(len(kills)),
                f"{100 * min(at):.0f}–{100 * max(at):.0f} ({len(set(at))} different)" if at else NOTHING,
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
            *(
                "run",
                "kills",
                "at % of the run",
                "while writing",
                "before the first",
                "updates repeated",
                "seconds to recover",
            ),
            "at the end",
        ),
        rows=tuple(rows),
        notes=(
            f"kills: SIGKILL of a random rank, {_moments(records)}; while writing: as a checkpoint was being written; "
            "before the first: when there was none yet, so that the run began anew",
            "at % of the run: the first and the last kill, by the progress entry before it and the frames of the whole "
            "run, and how many of these entries differ",
            "seconds to recover: from the start of the new process to the update at which the old one was killed; "
            "median [least–most]",
            "identical: final weights, and every byte of the checkpoint of the end: target network, optimizer, replay "
            "with its frames and priorities, games under way, episodes; and all rows of progress",
        ),
    )


def _fraction(kill: Record) -> float:
    """Return the share of the run's frames at which the kill came; old records hold the frames alone."""
    frames = kill.values["frames"]
    assert isinstance(frames, int)
    return frames / flag(str(kill.settings["flags"]).split(), "--frames")


def _moments(records: Sequence[Record]) -> str:
    if all("fraction" in r.values for r in records if r.settings["what"] == KILL):
        return "at a random moment in each of as many equal parts of the run's frames; the first before any checkpoint"
    return "at a random moment soon after the kill before was made good, not spread over the run"
