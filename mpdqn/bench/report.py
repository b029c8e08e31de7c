"""What a comparison leaves in its folder.

records.jsonl ─▶ table.md, table.tex, throughput.svg, throughput.png          traces/*.json ─▶ traces/*.svg, *.png
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mpdqn.bench.comparison import compare_table, heading
from mpdqn.bench.rows import rows_of
from mpdqn.bench.tables import Table
from mpdqn.bench.trace import read_trace
from mpdqn.bench.verdict import verdict
from mpdqn.extras import install_command, missing_packages
from mpdqn.files import check_own_folder, write_whole
from mpdqn.records import RECORDS, TRACES, Record, read_records


@dataclass(frozen=True, kw_only=True)
class Report:
    """The table of a comparison and its verdict in one sentence."""

    table: Table
    verdict: str

    def markdown(self) -> str:
        """Table, notes and verdict, as ``table.md`` holds them and a terminal shows them."""
        return f"{self.table.markdown()}\nVerdict: {self.verdict}\n"


def write_report(folder: Path, records: Iterable[Record]) -> Report:
    """Write table and figure of ``records`` into ``folder``, over those of an earlier call; same records, same bytes.

    Without the extra ``plot`` there are no figures, and a line on stderr says so.

    Raises:
        ValueError: if there are no records of a comparison, one lacks a value, a trace cannot be read, or
            their folder is a link.
    """
    records = tuple(records)
    report = Report(table=compare_table(records), verdict=verdict(records))
    check_own_folder(folder / TRACES)
    write_whole(folder / "table.md", report.markdown())
    write_whole(folder / "table.tex", report.table.latex())
    if missing := missing_packages("plot"):
        note = f"no plots: they need {missing}; {install_command('plot')}, then mpdqn compare --render-only {folder}"
        print(note, file=sys.stderr)
        return report
    # Matplotlib is an extra, and takes most of a second to import; no worker draws.
    from mpdqn.bench.gantt import gantt
    from mpdqn.bench.plots import save, throughput_figure

    save(throughput_figure(records), folder / "throughput")
    for path in sorted((folder / TRACES).glob("*.json")):
        try:
            timelines = read_trace(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; remove it or run again with --trace") from None
        gantt(timelines, path.with_suffix(""), f"{path.stem}, {heading(rows_of(records))}")
    return report


def read_run(folder: Path) -> tuple[Record, ...]:
    """The records of the run in ``folder``; ValueError if it holds none."""
    path = folder / RECORDS
    records = tuple(read_records(path)) if path.is_file() else ()
    if not records:
        raise ValueError(
            f"{folder} has no records ({path} {'is empty' if path.is_file() else 'does not exist'}); "
            "give the folder that `mpdqn compare` printed, results/compare/<run>, or run `mpdqn compare` first"
        )
    return records
