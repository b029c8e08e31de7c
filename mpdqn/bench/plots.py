"""The figure of a comparison: the throughput of every layout, with each round that it comes from.

Figures are made without pyplot, so nothing here depends on, or changes, a display or a session's style.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mpdqn.bench.comparison import hardware, heading
from mpdqn.bench.rows import Row, best_single, ratios, rows_of
from mpdqn.bench.tables import decimals, summarize
from mpdqn.files import replacing
from mpdqn.records import Record

# Okabe & Ito's palette: told apart by colour-blind readers and in grey print.
COLORS = {
    "single process": "#56B4E9",
    "data parallel": "#E69F00",
    "pipeline": "#009E73",
    "hybrid": "#CC79A7",
    "independent processes": "#BBBBBB",
}
HATCH = "////"
_MEDIAN, _RATIO = 1.09, 1.20  # right edges of the columns of numbers, in widths of the axes
_STYLE = {
    "svg.hashsalt": "mpdqn",  # fixed ids: the same records give the same file
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same text
    "font.size": 9.0,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


def throughput_figure(records: Iterable[Record]) -> Any:
    """Horizontal bars of transitions/s: median, min–max whiskers, a dot for each round, the best single process.

    Returns:
        a `matplotlib.figure.Figure`; `save` writes it.

    Raises:
        ValueError: if there are no records of a comparison.
    """
    rows = rows_of(records)
    reference = best_single(rows)
    with style():
        figure = Figure(figsize=(7.2, 1.75 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            _draw(axes, y, row, ratios(row.speeds, reference))
        if reference:
            axes.axvline(summarize(reference.values()).median, color="#333333", linestyle="--", linewidth=1, zorder=3)
        widest = max(max(row.speeds.values()) for row in rows)
        axes.set(xlim=(0, 1.04 * widest), ylim=(len(rows) - 0.4, -0.6), xlabel="transitions/s (more is better)")
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(handles=_handles(rows, bool(reference)), loc="outside lower center", ncols=3, frameon=False)
        _head(axes, rows, bool(reference))
    return figure


def save(figure: Any, stem: Path) -> tuple[Path, Path]:
    """Write ``figure`` as ``stem``.svg and ``stem``.png and return both paths; the same figure gives the same bytes."""
    svg, png = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("svg", "png"))
    with style():
        with replacing(svg) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        with replacing(png) as file:
            figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return svg, png


def kind(row: Row) -> str:
    """Which way of using several devices ``row`` is: a key of `COLORS`."""
    if row.count("copies") > 1:
        return "independent processes"
    names = ("single process", "data parallel", "pipeline", "hybrid")
    return names[(row.count("data") > 1) + 2 * (row.count("pipeline") > 1)]


def _draw(axes: Any, y: int, row: Row, pace: Sequence[float]) -> None:
    speeds = list(row.speeds.values())
    speed = summarize(speeds)
    hatch = HATCH if row.setting("oversubscribed") else None
    axes.barh(y, speed.median, height=0.66, color=COLORS[kind(row)], hatch=hatch, edgecolor="white", linewidth=0)
    whisker = [[speed.median - speed.low], [speed.high - speed.median]]
    axes.errorbar(speed.median, y, xerr=whisker, color="black", linewidth=1, capsize=3, zorder=4)
    # The dots of a row are spread a little, so that rounds of the same speed are seen.
    offsets = [0.24 * (i / (len(speeds) - 1) - 0.5) if len(speeds) > 1 else 0.0 for i in range(len(speeds))]
    axes.plot(
        speeds,
        [y + offset for offset in offsets],
        linestyle="none",
        marker="o",
        markersize=3.4,
        markerfacecolor="white",
        markeredgecolor="black",
        markeredgewidth=0.7,
        zorder=5,
    )
    _beside(axes, _MEDIAN, y, f"{speed.median:.{decimals(speed.median)}f}")
    if pace:
        _beside(axes, _RATIO, y, f"{summarize(pace).median:.2f}×")


def _head(axes: Any, rows: Sequence[Row], reference: bool) -> None:
    """What was trained, on which machine, and what the two columns of numbers are."""
    machine = textwrap.wrap(hardware(rows), 70)
    axes.set_title(heading(rows), loc="left", fontsize=10, fontweight="bold", pad=8 + 10 * len(machine))
    axes.annotate(
        "\n".join(machine), (0, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points", color="#555555"
    )
    _beside(axes, _MEDIAN, -0.75, "median", va="bottom", color="#555555")
    if reference:
        _beside(axes, _RATIO, -0.75, "× best", va="bottom", color="#555555")


def _beside(axes: Any, x: float, y: float, text: str, va: str = "center", color: str = "black") -> None:
    """A cell of the columns right of the bars, where no line crosses it."""
    axes.text(x, y, text, transform=axes.get_yaxis_transform(), ha="right", va=va, color=color, fontsize=8.5)


def _handles(rows: Sequence[Row], reference: bool) -> list[Any]:
    kinds = {kind(row) for row in rows}
    handles: list[Any] = [Patch(color=color, label=name) for name, color in COLORS.items() if name in kinds]
    if any(row.setting("oversubscribed") for row in rows):
        handles.append(Patch(facecolor="#888888", edgecolor="white", hatch=HATCH, linewidth=0, label="oversubscribed"))
    dot: dict[str, Any] = {"marker": "o", "markersize": 3.4, "markerfacecolor": "white", "markeredgewidth": 0.7}
    handles.append(Line2D([], [], color="black", linewidth=1, label="one round, min–max", **dot))
    if reference:
        label = "best single process (1.00×)"
        handles.append(Line2D([], [], color="#333333", linestyle="--", linewidth=1, label=label))
    return handles


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults and our own settings, whatever the user's matplotlibrc says; all put back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield
