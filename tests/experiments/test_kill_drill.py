"""The kill drill's moments are spread over the run, and its table says where they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.drill.moments import LATEST, kill_moments
from experiments.drill.table import drill_table
from experiments.kill_drill import CASES, SMOKE, Config, Drill
from mpdqn.records import RECORDS, Environment, Record, append_records


@pytest.mark.parametrize("kills", [1, 2, 10, 25])
@pytest.mark.parametrize("seed", range(20))
def test_there_is_a_kill_in_each_part_of_the_run(kills: int, seed: int) -> None:
    moments = kill_moments(kills, 16_000, 160, str(seed))
    part = LATEST * 16_000 / kills
    assert [int(moment // part) for moment in moments] == list(range(kills))
    assert moments[0] < 80, "before the first checkpoint"


def test_cases_are_long_enough() -> None:
    for case in (*CASES, *SMOKE):
        moments = case.moments(seed=0)
        assert len(set(moments)) == case.kills
        assert moments[-1] > 0.75 * case.frames * (1 - 1 / case.kills)


def kill(frames: int, **values: float) -> Record:
    return Record(
        experiment="kill_drill",
        row="a run",
        round=0,
        seed=0,
        settings={"what": "kill", "flags": "--env x --frames 1000", "layouts": "dp2"},
        values={
            "frames": frames,
            "updates_repeated": 1,
            "recovery_s": None,
            "while_writing": False,
            "resumed_at": 0,
            **values,
        },
        environment=Environment.current(),
    )


def test_the_table_says_where_in_the_run_the_kills_were() -> None:
    spread = drill_table([kill(k, fraction=k / 1000) for k in (20, 480, 930)]).markdown()
    assert "2–93 (3 different)" in spread
    assert "in each of as many equal parts" in spread
    bunched = drill_table([kill(k) for k in (20, 280, 280)]).markdown()
    assert "2–28 (2 different)" in bunched
    assert "not spread over the run" in bunched


def test_records_of_another_number_of_kills_are_not_mixed(tmp_path: Path) -> None:
    case = SMOKE[0]
    record = Record(
        experiment="kill_drill",
        row=case.name,
        round=0,
        seed=0,
        settings={"what": "kill", "kills": 7},
        values={},
        environment=Environment.current(),
    )
    append_records(tmp_path / RECORDS, [record])
    with pytest.raises(ValueError, match="with 7 kills, not 2; choose another --out"):
        Drill(case, Config(out=tmp_path))
