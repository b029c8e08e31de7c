"""A figure of timelines: a box for each span, words for each colour, numbers only where they fit, the same bytes."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from mpdqn.bench.gantt import COLORS, busy_share, gantt
from mpdqn.planner.simulate import simulate
from mpdqn.schedule import ActionTimes, action_table
from mpdqn.timeline import Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"
LINE = Timeline(
    (
        Span(0, "F", 0, 0, 10.0, 11.0),
        Span(0, "B", 0, 0, 12.0, 14.0),
        Span(0, "optimizer", -1, -1, 14.0, 14.5),
        Span(1, "F", 1, 0, 11.0, 11.6),
        Span(1, "B", 1, 0, 11.6, 12.0),
        Span(1, "exchange", -1, -1, 12.0, 20.0),
    ),
    99.0,
)


def simulated(schedule: str, p: int, m: int, steps: int = 1, ahead: str = "") -> Timeline:
    table = action_table(schedule, p, m, "TD", ahead=ahead)
    return simulate(table, ActionTimes.units(table.num_stages), steps=steps)


def draw(path: Path, **timelines: Timeline) -> ElementTree.Element:
    gantt(timelines, path / "gantt", "A title")
    assert (path / "gantt.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return ElementTree.parse(path / "gantt.svg").getroot()


def labels(path: Path) -> list[str]:
    """The texts of the figure: matplotlib draws them as outlines, and writes each in a comment."""
    return re.findall("<!-- (.*?) -->", (path / "gantt.svg").read_text(encoding="utf-8"))


def shapes(svg: ElementTree.Element, group: str) -> int:
    """How many shapes are in the group, which is a list of paths, or of uses of a common one."""
    (found,) = (element for element in svg.iter(f"{SVG}g") if element.get("id") == group)
    return sum(element.tag in (f"{SVG}path", f"{SVG}use") for element in found if element.tag != f"{SVG}defs")


def test_busy_is_the_share_of_the_window_of_all_ranks() -> None:
    assert busy_share(LINE, {"F", "B"}) == pytest.approx((1 + 2 + 0.6 + 0.4) / (2 * 10))
    assert busy_share(LINE, {"optimizer"}) == pytest.approx(0.5 / 20)
    assert busy_share(LINE, {"T"}) == busy_share(Timeline((), 1.0), {"F"}) == 0.0
    assert busy_share(Timeline((Span(0, "F", 0, 0, 1.0, 1.0),), 0.0), {"F"}) == 0.0


def test_a_box_for_each_span_and_a_label_for_each_rank(tmp_path: Path) -> None:
    line = simulated("1f1b", 2, 4)
    svg = draw(tmp_path, measured=LINE, simulated=line)
    assert [shapes(svg, f"boxes-{k}") for k in (0, 1)] == [6, 2 * 4 * 4]
    count = Counter(labels(tmp_path))
    assert count["rank 0"] == count["rank 1"] == 2
    assert count["A title"] == count["time [s]  ·  number in a box: micro-batch"] == 1
    assert count["measured: ranks busy 22.5 % of 10.0 s"] == 1  # the exchange is waiting
    assert count[f"simulated: ranks busy {100 * 40 / (2 * line.seconds):.1f} % of {line.seconds:.1f} s"] == 1
    assert count["3"] == 2 * 4  # F, B, T, D of micro-batch 3 on both ranks
    for kind in ("F", "B", "T", "D", "optimizer", "exchange"):
        assert count[COLORS[kind][1]] == 1
    assert not {COLORS["W"][1], "other", "ran late", "step 0"} & set(count)


def test_every_kind_has_its_own_colour() -> None:
    assert len({color for color, _ in COLORS.values()}) == len(COLORS) == len("FBIWRTDM") + 2


def test_what_ran_late_is_an_outline_and_no_work(tmp_path: Path) -> None:
    late = Timeline((*LINE.spans, Span(0, "late", -1, -1, 11.5, 14.0), Span(0, "X", 0, 3, 18.0, 20.0)), 10.0)
    svg = draw(tmp_path, measured=late)
    assert (shapes(svg, "boxes-0"), shapes(svg, "late-0")) == (7, 1)
    assert {"measured: ranks busy 32.5 % of 10.0 s", "ran late", "other"} <= set(labels(tmp_path))


def test_two_steps_have_numbers_and_a_line_between_them(tmp_path: Path) -> None:
    draw(tmp_path, simulated=simulated("td1f1b", 4, 8, steps=2, ahead="T"))
    count = Counter(labels(tmp_path))
    assert count["step 0"] == count["step 1"] == 1
    assert count["7"] == 2 * 4 * 4


def test_several_stages_of_a_rank_are_named_where_there_is_room(tmp_path: Path) -> None:
    draw(tmp_path, simulated=simulated("interleaved_1f1b", 2, 4))
    count = Counter(labels(tmp_path))
    assert {"rank 0", "stages 0, 2", "stages 1, 3", "lighter: a later stage of the rank"} <= set(count)
    assert [count[f"s{stage}"] for stage in range(4)] == [4 * 4] * 4
    svg = draw(tmp_path, simulated=simulated("zbv", 2, 16))
    assert shapes(svg, "boxes-0") == 16 * 5 * 4
    assert "s0" not in labels(tmp_path)
    fills = set(re.findall("fill: (#[0-9a-f]{6})", (tmp_path / "gantt.svg").read_text(encoding="utf-8")))
    assert {"#56b4e9", "#b3ddf5"} <= fills  # F of the first stage of a rank, and of the second


def test_a_stage_is_named_where_it_is_not_its_ranks_number(tmp_path: Path) -> None:
    draw(tmp_path, measured=Timeline((Span(2, "F", 0, 0, 0.0, 1.0), Span(3, "F", 1, 0, 0.0, 1.0)), 1.0))
    assert {"rank 2", "stage 0", "rank 3", "stage 1"} <= set(labels(tmp_path))


@pytest.mark.parametrize(
    ("seconds", "title", "axis"), [(2.0, "2.00 s", "s"), (0.5, "500.0 ms", "ms"), (4e-5, "40.0 µs", "µs")]
)
def test_the_unit_of_time_fits(tmp_path: Path, seconds: float, title: str, axis: str) -> None:
    draw(tmp_path, measured=Timeline((Span(0, "optimizer", -1, -1, 7.0, 7.0 + seconds),), seconds))
    assert {f"measured: ranks busy 100.0 % of {title}", f"time [{axis}]"} <= set(labels(tmp_path))


def test_many_narrow_boxes_have_no_numbers(tmp_path: Path) -> None:
    svg = draw(tmp_path, simulated=simulated("1f1b", 2, 128))
    assert shapes(svg, "boxes-0") == 2 * 128 * 4
    assert "time [s]" in labels(tmp_path)
    assert "127" not in labels(tmp_path)


def test_the_files_depend_on_nothing_but_the_timelines(tmp_path: Path) -> None:
    line = simulated("td1f1b", 2, 4, steps=2, ahead="T")
    drawn = random.Random(0)
    jittered = [replace(span, end=span.end - 0.2 * drawn.random() * span.seconds) for span in line.spans]
    both = {"measured": Timeline(tuple(jittered), line.seconds), "simulated": line}
    before = dict(matplotlib.rcParams)
    gantt(both, tmp_path / "first.figure", "A title")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "another"}):
        gantt(both, tmp_path / "again", "A title")
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"first.figure{suffix}").read_bytes() == (tmp_path / f"again{suffix}").read_bytes()


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no timeline"):
        gantt({}, tmp_path / "gantt", "")
    for spans in ((), (Span(0, "F", 0, 0, 1.0, 1.0),)):
        with pytest.raises(ValueError, match="no time passes in timeline 'measured'"):
            gantt({"measured": Timeline(spans, 1.0)}, tmp_path / "gantt", "")
    assert not list(tmp_path.iterdir())
