"""The figure is a function of the records: the same bytes for the same records, and readable files."""

from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from mpdqn.bench.plots import COLORS, kind, save, throughput_figure
from mpdqn.bench.rows import rows_of
from mpdqn.records import Record
from tests.bench.test_tables import DP2, PP2, record


def comparison() -> list[Record]:
    return [
        *(record("single@1", 1.0 + 0.1 * r, r) for r in range(3)),
        *(record("dp2", 0.6 + 0.1 * r, r, settings=DP2) for r in range(3)),
        *(record("dp2xpp2", 0.8, r, settings=PP2 | DP2 | {"oversubscribed": True}) for r in range(3)),
    ]


def test_each_kind_of_layout_has_its_colour() -> None:
    records = [*comparison(), record("pp2", 1.0, settings=PP2), record("2*single@1", 1.0, settings={"copies": 2})]
    assert [kind(row) for row in rows_of(records)] == [
        *("single process", "data parallel", "hybrid", "pipeline", "independent processes"),
    ]
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_bars_are_the_medians_and_the_dots_the_rounds() -> None:
    axes = throughput_figure(comparison()).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([64 / 1.1, 64 / 0.7, 64 / 0.8])
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, True]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["single@1", "dp2", "dp2xpp2"]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert dots[1] == pytest.approx([64 / 0.6, 64 / 0.7, 64 / 0.8])
    texts = [text.get_text() for text in axes.texts]
    assert "1.57×" in texts  # the median of 1.0/0.6, 1.1/0.7, 1.2/0.8
    assert not any(
        text == "× best" for text in (t.get_text() for t in throughput_figure(comparison()[3:]).axes[0].texts)
    )


def test_the_files_are_valid_and_depend_on_nothing_but_the_records(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    svg, png = save(throughput_figure(comparison()), tmp_path / "throughput.first")
    assert (svg.name, png.name) == ("throughput.first.svg", "throughput.first.png")
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "another"}):
        again = save(throughput_figure(comparison()), tmp_path / "again")
    assert [path.read_bytes() for path in (svg, png)] == [path.read_bytes() for path in again]
