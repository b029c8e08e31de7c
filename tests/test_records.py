"""A record survives its file, and a file that holds anything else says where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.records import PACKAGES, Environment, Record, append_records, read_records, without_place, without_places

reproducible = settings(deadline=None, derandomize=True, database=None)

ENVIRONMENT = Environment(
    commit="0123456789ab+",
    versions={"python": "3.11.7", "torch": "2.14.1"},
    hardware="a CPU",
    cores=2,
    memory_gib=7.6,
    command="mpdqn compare --rounds 3",
)

VALUES = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), max_size=4
)


def record(**changes: object) -> Record:
    fields: dict[str, object] = {
        "experiment": "layouts",
        "row": "pipeline p=2, m=4",
        "round": 0,
        "seed": 7,
        "settings": {"p": 2, "schedule": "1f1b", "fused": True, "limit": None},
        "values": {"transitions_per_s": 1234.5},
        "environment": ENVIRONMENT,
    }
    return Record(**fields | changes)  # type: ignore[arg-type]


@reproducible
@given(settings=VALUES, values=VALUES, row=st.text())
def test_json_both_ways(settings: dict[str, object], values: dict[str, object], row: str) -> None:
    one = record(settings=settings, values=values, row=row)
    line = one.to_json()
    assert Record.from_json(line) == one
    assert len(line.splitlines()) == 1


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [record(round=0), record(round=1)])
    append_records(path, [record(round=2, row="ein Gerät × zwei")])
    assert [r.round for r in read_records(path)] == [0, 1, 2]
    assert list(read_records(path))[2] == record(round=2, row="ein Gerät × zwei")


@pytest.mark.parametrize("bad", ["not json", "[]", "{}", '{"experiment": "layouts"}', record().to_json()[:-9]])
def test_a_bad_line_names_file_and_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [record(round=0)])
    with path.open("a") as file:
        file.write(bad + "\n")
    records = read_records(path)
    assert next(records).round == 0
    with pytest.raises(ValueError, match=rf"{path}, line 2 is not a record of this version: "):
        next(records)


def test_current_environment() -> None:
    here = Environment.current(devices="a GPU")
    assert here.hardware.startswith("a GPU, ")
    assert set(here.versions) == {"python", *PACKAGES}
    assert here.cores >= 1
    assert here.memory_gib > 0
    assert here.command
    assert Record.from_json(record(environment=here).to_json()).environment == here


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{here}/runs/a", "runs/a"),
        ("--out={here}/runs", "--out=runs"),
        ("{here}", "."),
        ("/somewhere/else/net.py:make", "net.py:make"),
        ("--network=/somewhere/net.py:make", "--network=net.py:make"),
        ("/a folder/with blanks", "with blanks"),
        ("['/a/b', \"/c/d\", (/e/f)]", "['b', \"d\", (f)]"),
        ("dp2,pp2-1f1b/m4", "dp2,pp2-1f1b/m4"),
        ("updates/s", "updates/s"),
        ("results/train", "results/train"),
        ("https://example.org/a", "https://example.org/a"),
        ("mean / median", "mean / median"),
        ("/", "/"),
    ],
)
def test_no_path_says_where_it_lies(text: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = without_place(text.format(here=tmp_path))
    assert found == shown
    assert without_place(found) == found


def test_a_record_and_its_command_have_no_place(tmp_path: Path) -> None:
    """Each was a copy of the command line, with the folders of the machine it ran on."""
    one = record(settings={"network": f"{tmp_path}/net.py:make", "layout": "pp2-1f1b/m4", "p": 2})
    assert dict(one.settings) == {"network": "net.py:make", "layout": "pp2-1f1b/m4", "p": 2}
    assert without_places({"out": tmp_path / "runs", "layouts": ("dp2", "/x/y"), "seed": 0}) == {
        "out": "runs",
        "layouts": ["dp2", "y"],
        "seed": 0,
    }
    (tmp_path / "mine.py").write_text("from mpdqn.records import Environment; print(Environment.current().command)")
    arguments = ["--out", "/somewhere/results", f"--run={tmp_path}/runs/a"]
    for program, shown in (([f"{tmp_path}/mine.py"], "mine.py"), (["-m", "mine"], "python -m mine")):
        done = subprocess.run(
            [sys.executable, *program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"{shown} --out results --run=runs/a"


PLACES = re.compile(rb"(?<![\w.-])/(home|root|tmp|work|mnt|Users|scratch|srv|opt|usr|var|data)/[\w.-]")


def test_no_result_that_is_kept_says_where_it_was_measured() -> None:
    results = Path(__file__).parents[1] / "docs" / "results"
    files = [path for path in results.rglob("*") if path.suffix in (".jsonl", ".json", ".md", ".tex", ".csv", ".svg")]
    assert len(files) > 20
    assert {str(path.relative_to(results)) for path in files if PLACES.search(path.read_bytes())} == set()
