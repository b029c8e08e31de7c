"""The table of `experiments.pipeline_peers`, as a function of its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.peers.contenders import YARDSTICK
from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Environment, Record, Value, read_records

FAILURE = "error"
"""The value of a record that says why a contender could not run."""


def failure(name: str, error: str, *, workload: str, seed: int, settings: dict[str, Value]) -> Record:
    """The record of a contender that could not run; its workload is another, since it takes no turn."""
    return Record(
        experiment="pipeline_peers",
        row=f"{workload}: {name}",
        round=0,
        seed=seed,
        settings={**settings, "workload": f"{workload}, could not run", "contender": name},
        values={FAILURE: error},
        environment=Environment.current(),
    )


def failures(path: Path, workload: str) -> list[Record]:
    """The records of contenders of ``workload`` that could not run."""
    return [r for r in read_records(path) if r.settings["workload"] == f"{workload}, could not run"]


def peers_table(records: Iterable[Record]) -> Table:
    """One row for each contender of one workload, in the order of their turns; ratios are taken within a round.

    Raises:
        ValueError: if there are no turns among the records.
    """
    every = list(records)
    turns = [record for record in every if FAILURE not in record.values]
    if not turns:
        raise ValueError(f"there are no turns among {len(every)} records; measure first")
    rates: dict[str, dict[int, float]] = {}
    for record in turns:
        rate = record.values["calls_per_s"]
        assert isinstance(rate, float)
        rates.setdefault(str(record.settings["contender"]), {})[record.round] = rate
    errors = {str(r.settings["contender"]): str(r.values[FAILURE]) for r in every if FAILURE in r.values}
    settings = turns[-1].settings
    names = str(settings["contenders"]).split("; ")
    return Table(
        title=f"One DQN update of {settings['workload']}",
        columns=("contender", "ranks × threads", "m", "updates/s", "transitions/s", f"× {YARDSTICK}"),
        rows=tuple(_row(turns[-1], i, name, rates) for i, name in enumerate(names)),
        notes=(
            f"median [min–max] of {len(rates[names[0]])} interleaved rounds; ratios are taken within a round",
            f"pipelines have two stages, cut alike after layer {settings['cut']}",
            "tuned: channels_last and the fused optimizer; in torch's and DeepSpeed's pipelines only the optimizer, as "
            "they cannot send channels_last tensors over gloo",
            "torchgpipe has one worker thread per device: on the CPU its partitions run one after the other",
            *(f"{name} could not run: {error}" for name, error in errors.items() if name not in rates),
            *_environments(turns),
        ),
    )


def _row(record: Record, index: int, name: str, rates: dict[str, dict[int, float]]) -> tuple[str, ...]:
    def setting(key: str) -> int:
        values = record.settings[key]
        assert isinstance(values, Sequence)
        return int(values[index])

    own, batch_size = rates[name], record.settings["batch_size"]
    assert isinstance(batch_size, int)
    ratios = [own[r] / reference for r, reference in rates[YARDSTICK].items() if r in own]
    return (
        name,
        f"{setting('ranks')} × {setting('threads')}",
        str(setting("m")),
        spread(summarize(own.values()), 2),
        spread(summarize(rate * batch_size for rate in own.values()), 1),
        f"{spread(summarize(ratios), 2)}×" if name != YARDSTICK else NOTHING,
    )


def _environments(records: Iterable[Record]) -> list[str]:
    notes: dict[str, None] = {}
    for record in records:
        e = record.environment
        installed = ", ".join(f"{name} {version}" for name, version in e.versions.items())
        notes[
            f"{e.hardware}, {e.cores} cores; {installed}, {record.settings['peers']}; commit {e.commit or 'unknown'}; "
            f"command: {e.command}; seed {record.seed}"
        ] = None
    return list(notes)
