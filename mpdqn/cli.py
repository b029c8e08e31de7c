"""The `mpdqn` command."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

from mpdqn.launch import GRACE_S, WorkerError
from mpdqn.mesh import PeerLost, launched_rank

Config = TypeVar("Config")

USAGE = """usage: mpdqn {compare,train,evaluate,curves} [flags]

  compare   measure data- and pipeline-parallel training of one network, side by side
  train     train an agent on one environment, on any layout
  evaluate  play episodes with a trained network, and score them
  curves    draw the learning curves of several runs in one figure

mpdqn COMMAND --help lists the flags of each.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: those of this process); returns the exit code.

    0 is success, 2 bad input or a failed worker with one line of why, 130 an interruption.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        print(f"mpdqn: unknown command {command!r}\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except (ValueError, OSError, WorkerError, ArithmeticError) as error:
        notes = "".join(getattr(error, "__notes__", ()))
        print(f"mpdqn {command}: {error}{notes}", file=sys.stderr)
        return 2
    except PeerLost as error:  # under torchrun, where no parent of ours sorts causes from consequences
        print(f"mpdqn {command}: {error}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
        os._exit(2)  # the ordinary way out would wait for peers that are gone
    except KeyboardInterrupt:
        print(f"mpdqn {command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


# Each command loads its own part of the package only: `mpdqn curves` needs no environments.


def _compare(flags: list[str]) -> None:
    from mpdqn.bench.compare import compare
    from mpdqn.bench.config import CompareConfig

    comparison = compare(_parse(CompareConfig, "compare", flags))
    if launched_rank() == 0:
        print(f"\n{comparison.table.markdown()}\n{comparison.verdict}\n\nWritten to {comparison.folder}/")


def _train(flags: list[str]) -> None:
    from mpdqn.train import TrainConfig, train

    result = train(_parse(TrainConfig, "train", flags))
    if launched_rank() == 0:
        print(result.summary())


def _evaluate(flags: list[str]) -> None:
    from mpdqn.bench.evaluation import EvaluateConfig, evaluate_run

    table = evaluate_run(_parse(EvaluateConfig, "evaluate", flags))
    print(table.markdown())


def _curves(flags: list[str]) -> None:
    from mpdqn.bench.curves import CurvesConfig, curves

    print("\n".join(f"Written to {path}" for path in curves(_parse(CurvesConfig, "curves", flags))))


def _parse(config: type[Config], command: str, flags: list[str]) -> Config:
    return tyro.cli(config, prog=f"mpdqn {command}", args=flags, config=(tyro.conf.FlagCreatePairsOff,))


COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "compare": _compare,
    "train": _train,
    "evaluate": _evaluate,
    "curves": _curves,
}
