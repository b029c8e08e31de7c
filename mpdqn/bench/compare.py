"""`compare`: the main job from a configuration to a `Comparison`.

check ─▶ launch ─▶ run_trials on every rank ─▶ records.jsonl ─▶ table.md, table.tex, throughput.svg and .png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpdqn.arrangement import NothingFits
from mpdqn.bench.comparison import compare_table
from mpdqn.bench.config import CompareConfig, check
from mpdqn.bench.report import read_run, write_report
from mpdqn.bench.tables import Table
from mpdqn.bench.trial import run_or_refuse, run_trials
from mpdqn.bench.verdict import verdict
from mpdqn.launch import launch
from mpdqn.launched import launched, launched_rank
from mpdqn.networks import NetworkFunction
from mpdqn.records import Record


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found. ``folder`` holds its files; ``records`` are all measurements."""

    table: Table
    verdict: str
    records: tuple[Record, ...]
    folder: Path


def compare(
    config: CompareConfig | None = None,
    *,
    network: str | NetworkFunction | None = None,
    layouts: Sequence[str] = (),
    **settings: Any,
) -> Comparison:
    """Compare layouts of one network's training, as ``mpdqn compare`` does.

    Started by torchrun, every process calls this alike; it returns on every rank once rank 0 has written the files.

    Args:
        config: what to compare; the main job by default.
        network: a zoo name, ``my_file.py:make_network``, or a function that takes the observation shape (C, H, W) and
            the number of actions and returns a `torch.nn.Sequential`, uint8 [B, C, H, W] -> float [B, A].
        layouts: texts such as ``"single@1"`` or ``"pp2-1f1b/m8"``.
        settings: other fields of `CompareConfig`.

    Raises:
        ValueError: for bad input, before any work; or for a layout that does not fit into memory, once the layers are
            measured.
        mpdqn.launch.WorkerError: if a worker fails, with its own error first.
    """
    config = replace(config or CompareConfig(), **settings)
    if config.render_only is not None:
        if launched_rank() > 0:  # rank 0 draws
            return _comparison(config.render_only, read_run(config.render_only))
        return render(config.render_only)
    job = check(config, network, layouts)
    if launched():
        folder, records = run_trials(job)
    else:
        outcome = launch(run_or_refuse, job, num_workers=job.num_ranks, timeout_s=job.config.timeout)[0]
        if isinstance(outcome, NothingFits):
            raise outcome
        folder, records = outcome
    if launched_rank() == 0:
        write_report(folder, records)
    return _comparison(folder, records)


def render(folder: Path) -> Comparison:
    """Draw table and plots of the run in ``folder`` again, from its records alone.

    Raises:
        ValueError: if there are no records.
    """
    records = read_run(folder)
    write_report(folder, records)
    return _comparison(folder, records)


def _comparison(folder: Path, records: tuple[Record, ...]) -> Comparison:
    return Comparison(table=compare_table(records), verdict=verdict(records), records=records, folder=folder)
