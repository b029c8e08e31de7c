"""`experiments.schedule_overhead` runs, made small, and its table says what the records say."""

from pathlib import Path

import pytest

from mpdqn.records import RECORDS, read_records
from mpdqn.schedule import SCHEDULES
from tests.experiments.running import run


@pytest.mark.pool
@pytest.mark.timeout(600)
def test_schedule_overhead_goes_on_where_it_stopped(tmp_path: Path) -> None:
    table = run("schedule_overhead", "--out", str(tmp_path))
    assert (tmp_path / "table.md").read_text() in table
    for name in SCHEDULES:
        assert f"| {name} " in table or f"- {name} runs the same actions as " in table
    records = list(read_records(tmp_path / RECORDS))
    contenders = [str(record.settings["contender"]) for record in records]
    assert len(set(contenders)) == len(contenders) == 13, "six schedules, torch's beside each, and the messages alone"
    assert contenders[:2] == ["gpipe", "torch ScheduleGPipe"]
    assert contenders[-1] == "isend and irecv"
    assert all("schedule_overhead" in record.environment.command for record in records)
    assert run("schedule_overhead", "--out", str(tmp_path)) == table, "all is there: nothing is measured again"
    assert list(read_records(tmp_path / RECORDS)) == records
