"""A pipeline of two stages beside two independent processes that run the same micro-batches and never talk.

    python -m experiments.pipeline_efficiency [--smoke]          about 8 minutes on 2 cores

The ratio is what cutting, bubble and messages leave of the two cores.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from mpdqn.bench.compare import compare
from mpdqn.bench.comparison import relative_table
from mpdqn.bench.config import CompareConfig

YARDSTICK = "2*single@1/m8"

CONFIG = CompareConfig(
    layouts=(YARDSTICK, "single@1/m8", "pp2-gpipe@1/m8", "pp2-1f1b@1/m8", "pp2-td1f1b@1/m8", "pp2-tdzb@1/m8"),
    rounds=7,
    steps=3,
    transitions=512,
    out=Path("results/pipeline_efficiency"),
)


def main(config: CompareConfig) -> None:
    """Measure, and write the table beside the comparison's own."""
    comparison = compare(config)
    table = relative_table(comparison.records, YARDSTICK)
    (comparison.folder / "efficiency.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main(tyro.cli(CompareConfig, default=CONFIG, config=(tyro.conf.FlagCreatePairsOff,)))
