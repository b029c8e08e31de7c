"""Learning curves: what a score did over the environment frames of several training runs, in one figure.

    run folder ─ records.jsonl ─▶ row, settings       runs alike in them are seeds: one line, with a band;
               └ progress.csv  ─▶ frames, score       its label says in which settings the lines differ

Runs are not logged at the same frames. Each is smoothed by itself and read off a common grid between its first and its
last frame, so that a line ends where the shortest of its runs does and never mixes few runs with many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpdqn.extras import require_extra
from mpdqn.logs import FRAMES, read_progress
from mpdqn.records import RECORDS, Record, read_records
from mpdqn.scores import bootstrap_interval, iqm

RETURN = "mean_return"
"""The column of ``progress.csv`` that holds the mean return of the episodes that ended since the row before."""

# Okabe & Ito's palette, each with a dash of its own: told apart in grey print too.
_LOOKS = (
    ("#0072B2", "-"),
    ("#E69F00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
    ("#D55E00", (0, (1, 1))),
    ("#000000", (0, (8, 3))),
)
_GRID = 200  # points of a line
_TWO_COLUMNS = 26  # letters of a label with which the legend's two columns are no wider than the figure

Band = Literal["min-max", "interval"]


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """What to draw."""

    runs: tuple[Path, ...]
    """Folders of training runs."""
    out: Path = Path("curves")
    """The figure, without its suffix: .svg and .png are written."""
    column: str = RETURN
    """Which column of progress.csv to draw."""
    average: Literal["mean", "iqm"] = "mean"
    """What a line is of the runs of one label."""
    band: Band = "min-max"
    """The smallest to the largest run, or the average's 95 % bootstrap interval."""
    window: int = 10
    """How many logged values of a run are averaged to smooth it; 1 is as logged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's curve: ``scores`` [n], smoothed, after ``frames`` [n] environment frames; ``label`` names its group."""

    label: str
    frames: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The runs of one label over common ``frames``: their average and the band from ``low`` to ``high``, all [k]."""

    label: str
    runs: int
    frames: NDArray[np.float64]
    average: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def curves(config: CurvesConfig) -> tuple[Path, Path]:
    """Draw the learning curves of ``config.runs`` and return the paths of SVG and PNG.

    Raises:
        ValueError: if a folder is no training run, or has nothing in the column; without the extra ``plot``.
    """
    require_extra("plot", "drawing curves")
    from mpdqn.bench.plots import save  # here, as matplotlib is an extra

    if not config.runs:
        raise ValueError("no runs to draw; give the folders of one or more training runs")
    scores = (read_curve(folder, config.column, config.window) for folder in config.runs)
    runs = [replace(run, label=label) for run, label in zip(scores, labels(config.runs), strict=True)]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    return save(curves_figure(group(runs, config.average, config.band), config), config.out)


def read_curve(folder: Path, column: str = RETURN, window: int = 1) -> Run:
    """The curve of the run in ``folder``: the mean of the last ``window`` values of ``column`` at each one logged.

    Raises:
        ValueError: if the folder is no training run, or has no number in the column.
    """
    if window < 1:
        raise ValueError(f"window is {window}, but at least one value is averaged; 1 is as logged")
    rows = read_progress(folder)
    points = sorted((row[FRAMES], row[column]) for row in rows if math.isfinite(row.get(column, math.nan)))
    if not points:
        known = ", ".join(dict.fromkeys(name for row in rows for name in row if name != FRAMES)) or "none"
        raise ValueError(f"{folder} has nothing in column {column!r} yet; its columns: {known}")
    frames, scores = np.array(points).T
    sums = np.concatenate([[0.0], np.cumsum(scores)])
    last = np.arange(1, len(scores) + 1)
    first = np.maximum(0, last - window)
    return Run(label=labels([folder])[0], frames=frames, scores=(sums[last] - sums[first]) / (last - first))


def group(runs: Iterable[Run], average: Literal["mean", "iqm"] = "mean", band: Band = "min-max") -> list[Curve]:
    """One curve for each label, in the order of their first runs."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    return [_curve(label, own, average, band) for label, own in by_label.items()]


def curves_figure(lines: Sequence[Curve], config: CurvesConfig) -> Any:
    """A `matplotlib.figure.Figure` of ``lines``; `mpdqn.bench.plots.save` writes it. Needs the extra ``plot``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from mpdqn.bench.plots import style

    with style():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            color, dash = _LOOKS[i % len(_LOOKS)]
            label = f"{line.label} ({line.runs} run{'s' if line.runs > 1 else ''})"
            axes.plot(line.frames, line.average, color=color, linestyle=dash, linewidth=1.6, label=label)
            if line.runs > 1:
                axes.fill_between(line.frames, line.low, line.high, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="environment frames", ylabel=config.column.replace("_", " "))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        short = max(len(line.label) for line in lines) <= _TWO_COLUMNS
        figure.legend(loc="outside lower center", ncols=2 if short and len(lines) > 1 else 1, frameon=False)
        if any(line.runs > 1 for line in lines):
            what = "smallest to largest run" if config.band == "min-max" else "95 % bootstrap interval over runs"
            name = "IQM" if config.average == "iqm" else "mean"
            axes.set_title(f"{name} over runs; band: {what}", loc="left", fontsize=9, color="#555555")
    return figure


def _curve(label: str, runs: Sequence[Run], average: Literal["mean", "iqm"], band: Band) -> Curve:
    start, stop = max(run.frames[0] for run in runs), min(run.frames[-1] for run in runs)
    if start > stop:
        raise ValueError(
            f"the runs of {label!r} share no frames: one begins at {start:,.0f} and one ends at {stop:,.0f}; draw fewer"
        )
    frames = np.linspace(start, stop, _GRID if stop > start else 1)
    scores = np.stack([np.interp(frames, run.frames, run.scores) for run in runs])
    of: Callable[[NDArray[np.float64]], float] = iqm if average == "iqm" else lambda column: float(column.mean())
    middle = np.array([of(column) for column in scores.T])
    low, high = scores.min(axis=0), scores.max(axis=0)
    if band == "interval" and len(runs) > 1:
        intervals = [bootstrap_interval(column, average) for column in scores.T]
        low, high = (np.array([getattr(i, end) for i in intervals]) for end in ("low", "high"))
    return Curve(label=label, runs=len(runs), frames=frames, average=middle, low=low, high=high)


def labels(folders: Sequence[Path]) -> list[str]:
    """What to call each run: the row of its record as a run (``train``), with the settings in which the runs differ.

    Runs of equal settings, which are other seeds of the same, have equal labels. A setting ``label`` replaces all that;
    a run without records, which has not ended, is called by its folder.
    """
    records = [_run_record(folder) for folder in folders]
    known = [record for record in records if record is not None]
    names = dict.fromkeys(name for record in known for name in record.settings)
    differ = [name for name in names if len({repr(record.settings.get(name)) for record in known}) > 1]

    def label(folder: Path, record: Record | None) -> str:
        if record is None:
            return folder.name
        if "label" in record.settings:
            return str(record.settings["label"])
        own = (f"{name.replace('_', ' ')} {record.settings[name]}" for name in differ if name in record.settings)
        return ", ".join([record.row, *own])

    return [label(folder, record) for folder, record in zip(folders, records, strict=True)]


def _run_record(folder: Path) -> Record | None:
    path = folder / RECORDS
    records = read_records(path) if path.is_file() else ()
    return next((record for record in records if record.experiment == "train"), None)
