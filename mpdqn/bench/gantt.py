"""Timelines as a figure: a panel for each, a row for each rank, a box for each span, one time axis below.

measured: ranks busy 84.2 % of 1.21 s        rank 0  |0|1|2|3| 0 | 1 | 2 | 3 |     the number is the micro-batch,
                                             rank 1  ..|0|0 |1|1 |2|2 |3|3 |..     the colour the kind, dots the bubble
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from mpdqn.bench.plots import save
from mpdqn.bench.tables import decimals
from mpdqn.timeline import LATE, Span, Timeline

# Okabe & Ito's palette, as in plots.py; the parts of a backward are as warm as the whole.
COLORS = {
    "F": ("#56B4E9", "F  forward"),
    "R": ("#0072B2", "R  recomputation"),
    "B": ("#E69F00", "B  backward"),
    "I": ("#D55E00", "I  backward for the input"),
    "W": ("#F0E442", "W  backward for the weights"),
    "T": ("#009E73", "T  target network on next_obs"),
    "M": ("#44AA99", "M  target network on obs"),
    "D": ("#CC79A7", "D  online network on next_obs"),
    "optimizer": ("#333333", "optimizer"),
    "exchange": ("#999999", "exchange of gradients"),
}
"""By kind: the colour of its boxes, and what it is in words."""

OTHER = ("#CCCCCC", "other")
WAITING = ("#EFEFEF", "waiting")

_WIDTHS = (7.2, 14.0)  # of a figure, in inches
_WIDE_ENOUGH = 9.0  # points; where short actions have narrower boxes, the figure gets wider
_HEIGHT, _LATE_HEIGHT = 0.78, 0.96  # of a box and of the outline around late ones, in rows
_FADE = 0.55  # how far the last of a rank's stages is mixed with white
_TITLE, _LETTER, _NUMBER, _SMALLEST = 10.5, 9.0, 8.0, 5.0  # sizes of text, in points
_DIGIT = 0.64  # the width of a digit, in sizes of its text


def gantt(timelines: Mapping[str, Timeline], path_stem: Path, title: str) -> None:
    """Write ``path_stem``.svg and .png: the timelines one below the other, each from its earliest span.

    The same timelines give the same files. Busy ranks are those that run an action or the optimizer's step.

    Args:
        timelines: by the name of their panel, from above: ``{"measured": …, "simulated": …}``.
        path_stem: where to, without the suffix.
        title: the figure's first line.

    Raises:
        ValueError: if there is no timeline, or one in which no time passes.
    """
    if not timelines:
        raise ValueError("no timeline to draw")
    for name, timeline in timelines.items():
        if not _window(timeline):
            raise ValueError(f"no time passes in timeline {name!r}")
    longest = max(map(_window, timelines.values()))
    unit, per_s = ("s", 1.0) if longest >= 1 else ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    panels = [_panel(name, timeline, unit, per_s) for name, timeline in timelines.items()]
    boxes = per_s * longest / min(panel.short for panel in panels)
    width = min(max(_WIDTHS[0], 1.2 + boxes * _WIDE_ENOUGH / 72), _WIDTHS[1])
    # On a page every figure is as wide as any other, so that wider ones need larger letters.
    scale = math.sqrt(width / _WIDTHS[0])
    with _style(scale):
        save(_figure(panels, title, unit, per_s * longest, width, scale), path_stem)


def busy_share(timeline: Timeline, kinds: Collection[str]) -> float:
    """The share of all ranks' time, from the first start to the last end, in spans of ``kinds``; 0 without any time."""
    ranks = {span.rank for span in timeline.spans}
    time = len(ranks) * _window(timeline)
    return sum(span.seconds for span in timeline.spans if span.kind in kinds) / time if time else 0.0


@dataclass(frozen=True)
class _Panel:
    """What is drawn of one timeline: spans in the figure's unit of time, from 0."""

    title: str
    spans: tuple[Span, ...]
    length: float

    @property
    def stages(self) -> dict[int, list[int]]:
        """The stages of each rank, in order; a rank's row is its place."""
        held: dict[int, set[int]] = {rank: set() for rank in sorted({span.rank for span in self.spans})}
        for span in self.spans:
            held[span.rank] |= {span.stage} - {-1}
        return {rank: sorted(stages) for rank, stages in held.items()}

    @property
    def short(self) -> float:
        """The length of a short action: of ten, nine are at least as long. The whole length if none takes time."""
        lengths = sorted(span.seconds for span in self.actions if span.seconds > 0)
        return lengths[len(lengths) // 10] if lengths else self.length

    @property
    def actions(self) -> list[Span]:
        """The spans that are an action, which has a letter."""
        return [span for span in self.spans if span.kind.isupper()]

    @property
    def steps(self) -> list[int]:
        """The steps that are there, in order."""
        return sorted({span.step for span in self.spans})


def _panel(name: str, timeline: Timeline, unit: str, per_s: float) -> _Panel:
    origin, length = min(span.start for span in timeline.spans), _window(timeline) * per_s
    # A letter is an action's. Ranks that exchange gradients mostly wait for one another, so that is not work.
    work = {span.kind for span in timeline.spans if span.kind.isupper() or span.kind == "optimizer"}
    share = f"{100 * busy_share(timeline, work):.1f} %"
    spans = (replace(s, start=(s.start - origin) * per_s, end=(s.end - origin) * per_s) for s in timeline.spans)
    return _Panel(f"{name}: ranks busy {share} of {length:.{decimals(length)}f} {unit}", tuple(spans), length)


def _figure(panels: Sequence[_Panel], title: str, unit: str, longest: float, width: float, scale: float) -> Any:
    """The figure, ``width`` inches wide; ``scale`` is the size of its letters and rows."""
    handles = _handles(panels)
    letters = max(len(words) for _, words in handles)
    fit = max(1, int(72 * width / ((0.53 * letters + 3.8) * _LETTER * scale)))
    lines = math.ceil(len(handles) / fit)
    rows = [len(panel.stages) for panel in panels]
    head = textwrap.wrap(title, int(72 * width / (0.7 * _TITLE * scale)), break_on_hyphens=False) or [""]
    height = scale * (0.68 + 0.17 * len(head) + 0.55 * len(rows) + 0.30 * sum(rows) + 0.19 * lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        axes.set(xlim=(-0.002 * longest, 1.002 * longest), ylim=(len(panel.stages) - 0.45, -0.55))
        axes.set_yticks(range(len(panel.stages)), [_row_name(rank, panel.stages) for rank in panel.stages])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        # The steps' numbers stand between the title and the first row.
        pad = (4 + 10 * (len(panel.steps) > 1)) * scale
        axes.set_title(panel.title, loc="left", fontsize=_LETTER * scale, pad=pad)
    grid[-1].set_xlabel(f"time [{unit}]")
    figure.suptitle("\n".join(head), x=0.01, ha="left", fontsize=_TITLE * scale, fontweight="bold")
    figure.legend(
        *zip(*handles, strict=True),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=math.ceil(len(handles) / lines),
        handlelength=1.4,
        frameon=False,
    )
    figure.draw_without_rendering()  # lays the panels out: only now is known how wide a box is
    points = grid[-1].get_window_extent().width / figure.dpi * 72 / (1.004 * longest)
    stages_too = any(len(held) > 1 for panel in panels for held in panel.stages.values()) and all(
        _fits(f"s{span.stage}", _SMALLEST * scale, panel.short * points) for panel in panels for span in panel.actions
    )
    numbers = 0
    for k, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        _boxes(axes, panel, points, k)
        _steps(axes, panel, points, scale)
        numbers += _numbers(axes, panel, points, scale, stages_too)
    if numbers:
        grid[-1].set_xlabel(f"time [{unit}]  ·  number in a box: micro-batch{', below it the stage' * stages_too}")
    return figure


def _boxes(axes: Any, panel: _Panel, points: float, k: int) -> None:
    """The rows of panel ``k`` and their boxes, outlines behind what ran late; a unit of time is ``points`` wide."""
    stages, row = panel.stages, {rank: y for y, rank in enumerate(panel.stages)}

    def corners(span: Span, height: float) -> list[tuple[float, float]]:
        top, bottom = row[span.rank] - height / 2, row[span.rank] + height / 2
        return [(span.start, top), (span.end, top), (span.end, bottom), (span.start, bottom)]

    late = [corners(span, _LATE_HEIGHT) for span in panel.spans if span.kind == LATE]
    drawn = [span for span in panel.spans if span.kind != LATE]
    boxes = [corners(span, _HEIGHT) for span in drawn]
    colors = [_color(span, stages[span.rank]) for span in drawn]
    edge = min(0.7, 0.07 * panel.short * points)  # narrow boxes would vanish between their edges
    axes.barh(list(row.values()), panel.length, height=_HEIGHT, color=WAITING[0], zorder=1)
    dashed = PolyCollection(late, facecolors="none", edgecolors="#333333", linestyles="dashed", linewidths=0.8)
    filled = PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=edge)
    dashed.set(zorder=2, gid=f"late-{k}")
    filled.set(zorder=3, gid=f"boxes-{k}")
    axes.add_collection(dashed)
    axes.add_collection(filled)


def _steps(axes: Any, panel: _Panel, points: float, scale: float) -> None:
    """If a panel has several steps: their numbers above, and a thin line down the rows where each next one begins."""
    free, size = 0.0, _NUMBER * scale  # from where there is room for the next number
    for step in panel.steps if len(panel.steps) > 1 else []:
        begins: dict[int, float] = {}
        for span in panel.spans:
            if span.step == step:
                begins[span.rank] = min(begins.get(span.rank, math.inf), span.start)
        rows = [(y, begins[rank]) for y, rank in enumerate(panel.stages) if rank in begins]
        if step != panel.steps[0]:
            line = [(begin, y + end) for y, begin in rows for end in (-0.5, 0.5)]
            axes.plot(*zip(*line, strict=True), color="black", linewidth=0.9, zorder=4)
        text, begin = f"step {step}", rows[0][1]
        if begin >= free:
            at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "in_layout": False}
            axes.annotate(text, (begin, 1), (0, 2), va="bottom", fontsize=size, color="#555555", **at)
            free = begin + (len(text) + 1) * _DIGIT * size / points


def _numbers(axes: Any, panel: _Panel, points: float, scale: float, stages_too: bool) -> int:
    """Write its micro-batch, and perhaps its stage below it, into each box with room for it; return how many texts."""
    width, written = panel.short * points, 0
    longest = [max((len(_texts(span)[k]) for span in panel.actions), default=1) for k in (0, 1)]
    # As large as short actions have room for, as far as it can still be read.
    large = min(max((width - 3.5) / (_DIGIT * longest[0]), _SMALLEST * scale), _NUMBER * scale)
    small = min(max((width - 2.0) / (_DIGIT * longest[1]), _SMALLEST * scale), 0.75 * large)
    lines = [(large, -0.13), (small, 0.21)] if stages_too else [(large, 0.0)]
    for y, (rank, held) in enumerate(panel.stages.items()):
        for span in (span for span in panel.actions if span.rank == rank):
            style = {"color": _ink(_color(span, held)), "ha": "center", "va": "center_baseline", "zorder": 5}
            for text, (size, below) in zip(_texts(span), lines, strict=False):
                if _fits(text, size, span.seconds * points):
                    middle = (span.start + span.end) / 2
                    axes.text(middle, y + below, text, fontsize=size, in_layout=False, **style)
                    written += 1
    return written


def _texts(action: Span) -> tuple[str, str]:
    """What stands in an action's box: its micro-batch, and its stage."""
    return str(action.microbatch), f"s{action.stage}"


def _fits(text: str, size: float, width: float) -> bool:
    """Whether a box ``width`` points wide has room for ``text`` in letters of ``size`` points."""
    return _DIGIT * size * len(text) + 1 <= width


def _color(span: Span, stages: Sequence[int]) -> str:
    """The colour of its kind, lighter for each further one of the rank's ``stages``."""
    color = COLORS.get(span.kind, OTHER)[0]
    return _faded(color, stages.index(span.stage) / (len(stages) - 1)) if span.stage in stages[1:] else color


def _faded(color: str, share: float) -> str:
    white = _FADE * share
    return str(to_hex([(1 - white) * part + white for part in to_rgb(color)]))


def _ink(color: str) -> str:
    """Black or white, whichever is seen better on ``color``."""
    red, green, blue = to_rgb(color)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def _handles(panels: Sequence[_Panel]) -> list[tuple[Any, str]]:
    """The legend of what is there: swatches, and what they are in words."""
    kinds = {span.kind for panel in panels for span in panel.spans}
    named = [COLORS[kind] for kind in COLORS if kind in kinds]
    other = [OTHER] * bool(kinds - COLORS.keys() - {LATE})
    handles: list[tuple[Any, str]] = [(Patch(color=color), words) for color, words in (*named, *other, WAITING)]
    if LATE in kinds:
        handles.append((Patch(facecolor="none", edgecolor="#333333", linestyle="--", linewidth=0.8), "ran late"))
    if any(len(held) > 1 for panel in panels for held in panel.stages.values()):
        color = (named or [OTHER])[0][0]
        handles.append(((Patch(color=color), Patch(color=_faded(color, 1.0))), "lighter: a later stage of the rank"))
    return handles


def _row_name(rank: int, stages: Mapping[int, Sequence[int]]) -> str:
    """The rank; its stages, too, unless each rank has the one of its own number."""
    here = stages[rank]
    if not here or all(list(held) == [other] for other, held in stages.items()):
        return f"rank {rank}"
    return f"rank {rank}\nstage{'s' * (len(here) > 1)} {', '.join(map(str, here))}"


def _window(timeline: Timeline) -> float:
    """Seconds from the first start to the last end."""
    first = min((span.start for span in timeline.spans), default=0.0)
    return max((span.end for span in timeline.spans), default=0.0) - first


@contextmanager
def _style(scale: float) -> Iterator[None]:
    """matplotlib's defaults and our own settings, whatever the user's matplotlibrc says; all put back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        sides = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": _LETTER * scale, **sides})
        yield
