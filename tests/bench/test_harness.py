"""`interleave`: turns in order, a record for each at once, and a run that goes on where it stopped."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpdqn.bench.harness import Isolated, interleave
from mpdqn.records import RECORDS, Record, read_records


class Log:
    """Contenders that write down when they were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def contender(self, name: str, stop_after: int = 10**9) -> Callable[[], None]:
        def call() -> None:
            if self.calls.count(name) >= stop_after:
                raise KeyboardInterrupt
            self.calls.append(name)

        return call

    def turns(self) -> str:
        """One letter a turn: with seconds = 0 a turn is a call to warm up and two more."""
        assert all(self.calls[i] == self.calls[i + 1] == self.calls[i + 2] for i in range(0, len(self.calls), 3))
        return "".join(self.calls[::3])


def run(folder: Path, log: Log, rounds: int, *, workload: str = "w", seed: int = 0, **settings: int) -> list[Record]:
    contenders = {name: log.contender(name) for name in "ABC"}
    return list(
        interleave(
            "speed",
            workload,
            contenders,
            folder=folder,
            rounds=rounds,
            seconds=0.0,
            seed=seed,
            settings={"threads": 2, **settings},
        )
    )


def test_contenders_take_turns(tmp_path: Path) -> None:
    log = Log()
    records = run(tmp_path / "new", log, rounds=3)
    assert log.turns() == "ABCABCABC"
    assert [(r.row, r.round) for r in records] == [(f"w: {name}", i) for i in range(3) for name in "ABC"]
    assert records == list(read_records(tmp_path / "new" / RECORDS))
    assert dict(records[4].settings) == {"workload": "w", "threads": 2, "contender": "B"}
    assert all(r.values["calls_per_s"] > 0 for r in records)  # type: ignore[operator]
    assert (records[0].experiment, records[0].seed) == ("speed", 0)


def test_a_second_run_makes_only_the_missing_turns(tmp_path: Path) -> None:
    first, second, third = Log(), Log(), Log()
    kept = run(tmp_path, first, rounds=1)
    records = run(tmp_path, second, rounds=3)
    assert second.turns() == "ABCABC"
    assert records[:3] == kept
    assert run(tmp_path, third, rounds=2) == records, "all there already"
    assert third.calls == []


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    log = Log()
    contenders = {name: log.contender(name, stop_after=3) for name in "AB"}
    contenders["C"] = log.contender("C", stop_after=0)
    with pytest.raises(KeyboardInterrupt):
        interleave("speed", "w", contenders, folder=tmp_path, rounds=2, seconds=0.0, seed=0, settings={"threads": 2})
    assert [r.settings["contender"] for r in read_records(tmp_path / RECORDS)] == ["A", "B"], "written at once"
    log = Log()
    run(tmp_path, log, rounds=2)
    assert log.turns() == "ABCABC", "the round that was broken off is run again"
    assert len(list(read_records(tmp_path / RECORDS))) == 6


def test_workloads_share_a_folder(tmp_path: Path) -> None:
    run(tmp_path, Log(), rounds=1)
    log = Log()
    records = run(tmp_path, log, rounds=1, workload="v", batch_size=3)
    assert log.turns() == "ABC"
    assert {r.settings["workload"] for r in records} == {"v"}
    assert len(list(read_records(tmp_path / RECORDS))) == 6


def test_records_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, Log(), rounds=1)
    for changed in ({"threads": 1}, {"batch_size": 3}, {"seed": 1}):
        log = Log()
        with pytest.raises(
            ValueError, match=r"holds 'w' with seed 0 and settings .*'threads': 2.*choose another --out"
        ):
            run(tmp_path, log, rounds=2, **changed)
        assert log.calls == []


def test_a_turn_is_as_long_as_asked(tmp_path: Path) -> None:
    log = Log()
    (record,) = interleave(
        "speed", "w", {"A": log.contender("A")}, folder=tmp_path, rounds=1, seconds=0.05, seed=0, settings={}
    )
    rate = record.values["calls_per_s"]
    assert isinstance(rate, float)
    assert 0 < rate <= (len(log.calls) - 1) / 0.05, "the call that warmed up does not count"


def slow_to_make(file: Path) -> Callable[[], None]:
    time.sleep(0.5)
    file.write_text("made")
    return lambda: time.sleep(0.01)


def fails_to_make() -> Callable[[], None]:
    raise ArithmeticError("no network")


@pytest.mark.pool
def test_a_contender_in_its_own_process_is_waited_for(tmp_path: Path) -> None:
    contender = Isolated(functools.partial(slow_to_make, tmp_path / "made"))
    try:
        contender.wait()
        assert (tmp_path / "made").exists()
        contender.wait()
        assert 0 < contender.rate(0.0) <= 100
        assert 0 < contender.rate(0.05) <= 100
    finally:
        contender.close()


@pytest.mark.pool
def test_what_goes_wrong_in_the_making_is_told() -> None:
    contender = Isolated(fails_to_make)
    try:
        with pytest.raises(RuntimeError, match=r"a contender failed:[\s\S]*ArithmeticError: no network"):
            contender.rate(0.0)
    finally:
        contender.close()


def ends_in_a_turn() -> Callable[[], None]:
    return functools.partial(os._exit, 3)


@pytest.mark.pool
def test_how_a_contender_has_ended_is_told() -> None:
    contender = Isolated(ends_in_a_turn)
    try:
        with pytest.raises(RuntimeError, match=r"^a contender's process ended with code 3$"):
            contender.rate(0.0)
    finally:
        contender.close()
