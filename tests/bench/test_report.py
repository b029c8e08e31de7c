"""`--render-only` draws from the records alone, and the same records give the same files."""

from pathlib import Path

import pytest

from mpdqn.bench.compare import render
from mpdqn.bench.report import read_run, write_report
from mpdqn.bench.trace import chrome_trace
from mpdqn.records import RECORDS, TRACES, append_records
from mpdqn.timeline import Span, Timeline
from tests.bench.test_plots import comparison

FILES = ("table.md", "table.tex", "throughput.svg", "throughput.png")


def test_a_report_is_drawn_again_from_the_records_alone(tmp_path: Path) -> None:
    first = write_report(tmp_path, comparison())
    written = {name: (tmp_path / name).read_bytes() for name in FILES}
    append_records(tmp_path / RECORDS, comparison())
    for name in FILES:
        (tmp_path / name).unlink()
    again = render(tmp_path)
    assert (again.table, again.verdict) == (first.table, first.verdict)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == written
    assert read_run(tmp_path) == tuple(comparison())


def test_a_trace_is_drawn_next_to_its_json(tmp_path: Path) -> None:
    folder = tmp_path / TRACES
    folder.mkdir()
    line = Timeline((Span(0, "F", 0, 0, 0.0, 1.0), Span(1, "F", 1, 0, 1.0, 2.0)), 2.0)
    (folder / "pp2-zbv_m2.json").write_text(chrome_trace({"measured": line, "simulated": line}))
    write_report(tmp_path, comparison())
    assert {path.name for path in folder.iterdir()} == {f"pp2-zbv_m2.{end}" for end in ("json", "svg", "png")}
    assert b"pp2-zbv_m2, resnet18 on pong" in (folder / "pp2-zbv_m2.svg").read_bytes()
    (folder / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"traces/broken\.json: no trace: .*; remove it or run again with --trace"):
        write_report(tmp_path, comparison())


def test_a_report_follows_no_link(tmp_path: Path) -> None:
    """The folder to draw in may be another user's."""
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("kept")
    folder.mkdir()
    for name in FILES:
        (folder / name).symlink_to(precious)
    write_report(folder, comparison())
    assert precious.read_text() == "kept"
    assert not any((folder / name).is_symlink() for name in FILES)
    (folder / TRACES).symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"traces is a symbolic link but must be a folder of its own; delete the link"):
        write_report(folder, comparison())


def test_the_markdown_holds_table_and_verdict(tmp_path: Path) -> None:
    report = write_report(tmp_path, comparison())
    text = (tmp_path / "table.md").read_text()
    assert text == report.markdown()
    assert report.table.markdown() in text
    assert text.endswith(f"Verdict: {report.verdict}\n")
    assert (tmp_path / "table.tex").read_text() == report.table.latex()


def test_a_folder_without_records_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist\); give the folder that `mpdqn compare` printed"):
        render(tmp_path)
    (tmp_path / RECORDS).touch()
    with pytest.raises(ValueError, match="is empty"):
        render(tmp_path)
