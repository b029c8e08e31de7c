"""The record of a training run says what was computed, not what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpdqn.mesh import World
from mpdqn.pipeline.acceleration import Acceleration
from mpdqn.records import RECORDS, read_records
from mpdqn.train.check import check
from mpdqn.train.run import train_in
from tests.train.settings import small


def test_the_record_counts_the_modules_that_were_compiled(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said "compiled" of runs in which dynamo had given up on most of the modules."""
    monkeypatch.setitem(Acceleration.__init__.__kwdefaults__, "backend", "eager")  # inductor takes long
    config = small(tmp_path, frames=600, agent="dqn", layout="pp2-1f1b+stacked/m2", compile="on")
    (record,) = read_records(train_in(alone, check(config)).folder / RECORDS)
    assert record.settings["precision"] == "float32, compiled"
    assert record.values["compiled_modules"] == 2 * 2, "two stages of the target pass and of the online network"
