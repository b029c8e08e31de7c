"""Target forwards in the bubble of a pipeline: p = 4 emulated devices, real processes, real messages, the real learner.

    python -m experiments.emulated_pipeline [--smoke]          about 4 minutes on 2 cores; run again, it goes on

An emulated device sleeps for as long as it would work: F, D and T one unit of 30 ms, B two. All rows do the same work
for a Double DQN update:

    td1f1b, tdzb         the target forwards of the next batch in the gaps of 1F1B or of a zero-bubble order
    three passes         T, then D, then 1F1B, one after the other without a drain between them
    one fused pass       one 1F1B pass whose forward is as long as all three (through the pipeline alone, no agent)
    zbv, interleaved     two stages of half a unit on each device, T and D in front (only at m = 8)

The folder gets the table, and each row's measured timeline above the simulated one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mpdqn.bench.emulated import StageSeconds
from mpdqn.bench.emulated_row import EmulatedRow
from mpdqn.bench.emulated_turns import Turns, measure, shortened_note
from mpdqn.bench.gantt import gantt
from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.bench.trace import read_trace
from mpdqn.dqn.agents import double_dqn
from mpdqn.records import Record

FILLED, THREE, FUSED = "td1f1b", "three passes", "one fused pass"
ROWS = {
    FILLED: ("td1f1b", 1),
    "tdzb": ("tdzb", 1),
    THREE: ("1f1b", 1),
    FUSED: ("1f1b", 1),
    "zbv": ("zbv", 2),
    "interleaved": ("interleaved_1f1b", 2),
}
"""The schedule of each row, and its stages on each device."""

CLOSE = 0.03
BARS = {THREE: 1.07, FUSED: 1.15}
"""At m = 8, by which factor `FILLED` must be faster than these; every utilisation within `CLOSE` of the simulated."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/emulated_pipeline")
    """Folder of the records."""
    pipeline: int = 4
    """p, emulated devices and processes."""
    unit: float = 0.03
    """Seconds of a forward of one micro-batch on one device."""
    rounds: int = 3
    """Turns of each row."""
    updates: int = 3
    """Updates of a turn, after one to warm up."""
    seed: int = 0
    """Seed of the batches."""
    smoke: bool = False
    """One short round."""


def rows(config: Config, microbatches: Sequence[int]) -> dict[tuple[str, int], EmulatedRow]:
    """The rows by name and m."""
    found = {}
    for m in microbatches:
        for name, (schedule, virtual) in ROWS.items():
            if virtual > 1 and m > microbatches[0]:
                continue
            unit = config.unit / virtual
            forward = 3 * unit if name == FUSED else unit
            stage = StageSeconds(forward_s=forward, backward_input_s=unit, backward_weight_s=unit)
            found[name, m] = EmulatedRow(
                name=f"{name}, m = {m}",
                schedule=schedule,
                pipeline=config.pipeline,
                num_microbatches=m,
                stages=(stage,) * (config.pipeline * virtual),
                batch_size=2 * m,
                agent=None if name == FUSED else double_dqn(),
            )
    return found


def main(config: Config) -> None:
    """Measure, and write the table and the figures."""
    if config.smoke:
        config = Config(out=config.out, pipeline=2, unit=0.002, rounds=1, updates=1, seed=config.seed, smoke=True)
    measured = rows(config, (4,) if config.smoke else (8, 16))
    turns = Turns(
        experiment="emulated_pipeline",
        rows=tuple(measured.values()),
        folder=config.out,
        rounds=config.rounds,
        updates=config.updates,
        seed=config.seed,
        smoke=config.smoke,
    )
    records = measure(turns)
    for row in turns.rows:
        trace = turns.trace(row)
        gantt(
            read_trace(trace.read_text()),
            trace.with_suffix("").with_name(trace.stem.replace("trace", "timeline")),
            f"emulated: {row.name}, p = {row.pipeline}, two updates in a row",
        )
    table = pipeline_table(records, measured, config)
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


def pipeline_table(records: Sequence[Record], measured: Mapping[tuple[str, int], EmulatedRow], config: Config) -> Table:
    """A row for each way and m; ratios of the time of an update are taken within a round."""
    steps: dict[tuple[str, int], dict[int, float]] = {}
    utilisation: dict[tuple[str, int], list[float]] = {}
    for key, row in measured.items():
        own = [record for record in records if record.row == row.name]
        steps[key] = {record.round: _number(record, "step_s") for record in own}
        utilisation[key] = [_number(record, "utilisation") for record in own]

    def faster(key: tuple[str, int], than: str) -> list[float]:
        return [steps[than, key[1]][r] / step for r, step in steps[key].items()]

    lines = [
        (
            name,
            str(m),
            spread(summarize(1e3 * step for step in steps[name, m].values()), 0),
            f"{1e3 * row.simulated.step_s:.0f}",
            spread(summarize(utilisation[name, m]), 3),
            f"{row.simulated.mean_utilisation:.3f}",
            *(
                NOTHING if name == other else f"{spread(summarize(faster((name, m), other)), 3)}×"
                for other in (THREE, FUSED)
            ),
        )
        for (name, m), row in measured.items()
    ]
    off = {
        row.name: abs(statistics.median(utilisation[key]) - row.simulated.mean_utilisation)
        for key, row in measured.items()
    }
    far = [f"{name} ({by:.3f})" for name, by in off.items() if by > CLOSE]
    verdicts = [
        f"every utilisation within {CLOSE} of the simulated: {_met(not far)}, at most {max(off.values()):.3f} off"
        + (f"; too far: {', '.join(far)}" if far else "")
    ]
    for (name, m), row in measured.items():
        if name in BARS and m == 8:
            ratio = statistics.median(faster((FILLED, m), name))
            wanted = BARS[name]
            verdicts.append(f"{FILLED} at least {wanted}× {row.name}: {_met(ratio >= wanted)}, {ratio:.3f}×")
    e = records[-1].environment
    return Table(
        title=f"A Double DQN update on p = {config.pipeline} emulated devices",
        columns=(
            *("way", "m", "update ms", "simulated ms", "utilisation", "simulated"),
            *(f"× {other}" for other in (THREE, FUSED)),
        ),
        rows=tuple(lines),
        notes=(
            f"emulated: a device sleeps {1e3 * config.unit:g} ms for F, D and T of a micro-batch and twice that "
            f"for B; processes, messages and learner are real, {config.pipeline} processes on {e.cores} cores",
            "utilisation: work of the emulated devices as a share of the time from update to update, on the slowest "
            "rank; the simulator has free messages and nothing but the emulated work",
            shortened_note(records),
            f"median [min–max] of {len({record.round for record in records})} interleaved rounds of {config.updates} "
            "updates; ratios are taken within a round, above 1 is faster",
            *verdicts,
            f"{e.hardware}; torch {e.versions['torch']}; commit {e.commit or 'unknown'}; command: {e.command}; "
            f"seed {config.seed}",
        ),
    )


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def _number(record: Record, name: str) -> float:
    value = record.values[name]
    assert isinstance(value, float)
    return value


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
