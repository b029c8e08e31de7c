"""GPipe's throughput table on emulated devices: K stages, m micro-batches, normalised to K = 2 and m = 1.

    python -m experiments.gpipe [--smoke]          about 3 minutes on 2 cores; run again, it goes on

As there, every forward is run again before its backward, and the order is all forwards, then all backwards. The work of
the network is fixed: a forward of the whole batch takes `Config.forward` seconds on one device, a stage 1/K of it and a
micro-batch 1/m of that; a backward takes twice as long. It is a pipeline alone, F and B without a target network. A
device sleeps for its work, so the numbers say what order, messages and runtime cost and nothing of kernels, which are
slower on small micro-batches. The other columns are published ones, measured on different hardware.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mpdqn.bench.emulated import StageSeconds
from mpdqn.bench.emulated_row import EmulatedRow
from mpdqn.bench.emulated_turns import Turns, measure, shortened_note
from mpdqn.bench.tables import NOTHING, Table, spread, summarize
from mpdqn.records import Record

Cell = tuple[int, int]
"""K stages and m micro-batches."""

PUBLISHED: dict[str, dict[Cell, float]] = {
    "GPipe paper (S)": {
        **{(2, 1): 1.0, (2, 4): 1.07, (2, 32): 1.21},
        **{(4, 1): 1.13, (4, 4): 1.26, (4, 32): 1.84},
        **{(8, 1): 1.38, (8, 4): 1.72, (8, 32): 3.48},
    },
    "torchgpipe (S)": {
        **{(2, 1): 1.0, (2, 4): 1.539, (2, 32): 1.773},
        **{(4, 1): 1.004, (4, 4): 1.666, (4, 32): 2.709},
        **{(8, 1): 0.932, (8, 4): 2.621, (8, 32): 4.953},
    },
}
"""AmoebaNet-D, normalised throughput (Huang et al. 2019), and torchgpipe's run of it again on Tesla P40 (Kim et al.
2020). S: read in the source or its repository."""

BASE: Cell = (2, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    out: Path = Path("results/gpipe")
    """Folder of the records."""
    forward: float = 0.96
    """Seconds of the whole network's forward of a batch on one emulated device."""
    rounds: int = 3
    """Turns of each row."""
    updates: int = 2
    """Updates of a turn, after one to warm up."""
    seed: int = 0
    """Seed of the batch."""
    smoke: bool = False
    """One short round."""


def rows(config: Config, stages: Sequence[int], microbatches: Sequence[int]) -> dict[Cell, EmulatedRow]:
    """The rows by K and m."""
    found = {}
    for count in stages:
        for m in microbatches:
            unit = config.forward / (count * m)
            stage = StageSeconds(forward_s=unit, backward_input_s=unit, backward_weight_s=unit)
            found[count, m] = EmulatedRow(
                name=f"K = {count}, m = {m}",
                schedule="gpipe",
                pipeline=count,
                num_microbatches=m,
                stages=(stage,) * count,
                batch_size=32,
                recompute=True,
            )
    return found


def main(config: Config) -> None:
    """Measure, and write the table."""
    if config.smoke:
        config = Config(out=config.out, forward=0.01, rounds=1, updates=1, seed=config.seed, smoke=True)
    cells = rows(config, (2, 4), (1, 4)) if config.smoke else rows(config, (2, 4, 8), (1, 4, 32))
    records = measure(
        Turns(
            experiment="gpipe",
            rows=tuple(cells.values()),
            folder=config.out,
            rounds=config.rounds,
            updates=config.updates,
            seed=config.seed,
            smoke=config.smoke,
        )
    )
    table = gpipe_table(records, cells, config)
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


def gpipe_table(records: Sequence[Record], cells: Mapping[Cell, EmulatedRow], config: Config) -> Table:
    """A row for each K and m; the throughput is taken within a round as a multiple of that of `BASE`."""
    steps: dict[Cell, dict[int, float]] = {}
    for cell, row in cells.items():
        steps[cell] = {}
        for record in records:
            step_s = record.values["step_s"]
            assert isinstance(step_s, float)
            if record.row == row.name:
                steps[cell][record.round] = step_s
    lines = [
        (
            str(cell[0]),
            str(cell[1]),
            spread(summarize(1e3 * step for step in steps[cell].values()), 0),
            spread(summarize(steps[BASE][r] / step for r, step in steps[cell].items()), 2),
            f"{cells[BASE].simulated.step_s / row.simulated.step_s:.2f}",
            *(f"{column[cell]:g}" if cell in column else NOTHING for column in PUBLISHED.values()),
        )
        for cell, row in cells.items()
    ]
    e = records[-1].environment
    ranks = max(count for count, _ in cells)
    return Table(
        title="GPipe: throughput by stages and micro-batches, K = 2 and m = 1 is 1",
        columns=("K", "m", "update ms", "mpdqn, emulated", "simulated", *PUBLISHED),
        rows=tuple(lines),
        notes=(
            f"emulated: a device sleeps {config.forward:g} s / (K·m) for a forward, as long to run it again, "
            f"and twice that for a backward; processes and messages are real, {ranks} processes on {e.cores} cores",
            "simulated: free messages and nothing but the emulated work",
            shortened_note(records),
            f"median [min–max] of {len({record.round for record in records})} interleaved rounds of {config.updates} "
            "updates; ratios are taken within a round",
            "published: AmoebaNet-D, different hardware (GPipe: Huang et al. 2019; torchgpipe: Kim et al. 2020, "
            "Tesla P40); S: read in the source or its repository",
            f"{e.hardware}; torch {e.versions['torch']}; commit {e.commit or 'unknown'}; command: {e.command}; "
            f"seed {config.seed}",
        ),
    )


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
