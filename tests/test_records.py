"""A record survives its file, and a file that holds anything else says where."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.records import PACKAGES, Environment, Record, append_records, read_records

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
