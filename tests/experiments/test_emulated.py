"""The emulated experiments' real mains run, made small, and go on where they stopped."""

from pathlib import Path

import pytest

from experiments import emulated_pipeline
from mpdqn.records import RECORDS, Record, read_records
from tests.experiments.running import run


def kept(folder: Path) -> list[Record]:
    return list(read_records(folder / RECORDS))


@pytest.mark.pool
@pytest.mark.timeout(600)
def test_emulated_pipeline(tmp_path: Path) -> None:
    table = run("emulated_pipeline", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    assert "emulated" in table
    records = kept(tmp_path)
    ways = ("td1f1b", "tdzb", "three passes", "one fused pass", "zbv", "interleaved")
    assert [record.row for record in records] == [f"{way}, m = 4" for way in ways]
    for record in records:
        values = record.values
        assert record.settings["emulated"] is True
        assert 0 < values["utilisation"] < 1.5  # type: ignore[operator]
        assert 0 < values["simulated_utilisation"] < 1.001  # type: ignore[operator]
    for suffix in ("svg", "png"):
        assert len(list(tmp_path.glob(f"timeline-*.{suffix}"))) == len(ways)

    # A round that was broken off is measured again, as a whole; a whole one is not.
    path = tmp_path / RECORDS
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)[:2]))
    run("emulated_pipeline", "--out", str(tmp_path))
    assert [record.row for record in kept(tmp_path)] == [record.row for record in records]
    again, table = kept(tmp_path), (tmp_path / "table.md").read_text()
    emulated_pipeline.main(emulated_pipeline.Config(out=tmp_path, smoke=True))
    assert kept(tmp_path) == again
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(ValueError, match=r"with seed 0 and settings .* choose another --out"):
        emulated_pipeline.main(emulated_pipeline.Config(out=tmp_path, smoke=True, seed=1))


@pytest.mark.pool
@pytest.mark.timeout(600)
def test_gpipe(tmp_path: Path) -> None:
    table = run("gpipe", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    assert [record.row for record in kept(tmp_path)] == [f"K = {k}, m = {m}" for k in (2, 4) for m in (1, 4)]
    assert "different hardware" in table
    assert "1.539" in table
