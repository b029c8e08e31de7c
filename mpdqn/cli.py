"""The `mpdqn` command."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mpdqn import forkserver
from mpdqn.failures import GRACE_S, PeerLost
from mpdqn.launched import launched, launched_rank, launched_world_size

Config = TypeVar("Config")

USAGE = """usage: mpdqn {compare,train,status,evaluate,curves} [flags]

  compare   measure data- and pipeline-parallel training of one network, side by side
  train     train an agent on one environment, on any layout; or go on with a run that was stopped or killed
  status    say how far a training run is, and what it can go on from
  evaluate  play episodes with a trained network, and score them
  curves    draw the learning curves of several runs in one figure

mpdqn COMMAND --help lists the flags of each.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: those of this process); returns the exit code.

    0 is success, 2 bad input or a failed worker with one line of why, 75 a training run that was asked to stop
    (SIGTERM) and can be gone on with, 130 an interruption.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        print(f"mpdqn: unknown command {command!r}\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        if _will_start_ranks(command, rest):
            forkserver.start()  # it imports torch while this process does
    except OSError as error:
        print(f"mpdqn {command}: the server for ranks cannot be started: {error}", file=sys.stderr)
        return 2
    from mpdqn.launch import WorkerError

    try:
        return COMMANDS[command](rest) or 0
    except (ValueError, OSError, WorkerError, ArithmeticError) as error:
        _print_failure(command, error)
        code = 2
    except PeerLost as error:  # under torchrun, where no parent of ours sorts causes from consequences
        _print_failure(command, error)
        time.sleep(GRACE_S)
        code = 2
    except KeyboardInterrupt:
        print(f"\nmpdqn {command}: interrupted", file=sys.stderr)  # a progress bar may stand unfinished on the line
        code = 128 + signal.SIGINT
    if launched_world_size() > 1:  # the ordinary way out could wait for peers, or be woken by them while it ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _will_start_ranks(command: str, flags: Sequence[str]) -> bool:
    """Return whether the command starts a pool, as far as a look at its flags tells."""
    if launched() or {"-h", "--help", "--render-only"} & set(flags):
        return False
    words = [word for flag in flags for word in flag.split("=", 1)]
    layout = next((value for flag, value in itertools.pairwise(words) if flag == "--layout"), "single")
    acting = ("--actors", "workers") in itertools.pairwise(words)
    return command == "compare" or (command == "train" and (acting or not layout.startswith("single")))


def _print_failure(command: str, error: BaseException) -> None:
    """Print what there is to read of ``error``, such as a rank's traceback, and last the one line that says why."""
    from mpdqn.launch import WorkerError

    notes = getattr(error, "__notes__", ())
    if isinstance(error, WorkerError):  # a progress bar may stand unfinished on the line
        print(file=sys.stderr)
    for note in notes:
        if "\n" in note:
            print(note.strip("\n"), file=sys.stderr)
    line = " ".join(str(error).split("\n")) + "".join(f" ({note})" for note in notes if "\n" not in note)
    print(f"mpdqn {command}: {line}", file=sys.stderr, flush=True)


# Each command imports only what it needs itself; the server that forks its ranks imports torch at the same time.


def _compare(flags: list[str]) -> None:
    from mpdqn.bench.compare import compare
    from mpdqn.bench.config import CompareConfig

    comparison = compare(_parse(CompareConfig, "compare", flags))
    if launched_rank() == 0:
        print(f"\n{comparison.table.markdown()}\n{comparison.verdict}\n\nWritten to {comparison.folder}/")


def _train(flags: list[str]) -> int:
    from mpdqn.train import TrainConfig, train
    from mpdqn.train.resume import recorded_config
    from mpdqn.train.stop import EXIT_RESUMABLE

    # What a run was told before is the default of all other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume", type=Path)
    folder = first.parse_known_args(flags)[0].resume
    default = None if folder is None else recorded_config(folder)
    # Before a run notes it, there is nothing to save: the same command, or --resume, goes on from where it was.
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_RESUMABLE))
    try:
        config = _parse(TrainConfig, "train", flags, default)
        named = any(flag.partition("=")[0].replace("_", "-") == "--replay-dir" for flag in flags)
        result = train(config, **({"replay_dir": config.replay_dir} if named else {}))
    except KeyboardInterrupt as error:
        if "SIGTERM" not in str(error):
            raise
        print(f"mpdqn train: {error}; the checkpoints are as they were", file=sys.stderr)
        return EXIT_RESUMABLE
    finally:
        signal.signal(signal.SIGTERM, before)
    if launched_rank() == 0:
        print(result.summary())
    return 0 if result.stopped_at is None else EXIT_RESUMABLE


def _status(flags: list[str]) -> None:
    from mpdqn.train.status import describe

    parser = argparse.ArgumentParser(prog="mpdqn status", description="How far a training run is.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    print(describe(parser.parse_args(flags).folder))


def _evaluate(flags: list[str]) -> None:
    from mpdqn.bench.evaluation import EvaluateConfig, evaluate_run

    table = evaluate_run(_parse(EvaluateConfig, "evaluate", flags))
    print(table.markdown())


def _curves(flags: list[str]) -> None:
    from mpdqn.bench.curves import CurvesConfig, curves

    print("\n".join(f"Written to {path}" for path in curves(_parse(CurvesConfig, "curves", flags))))


def _parse(config: type[Config], command: str, flags: list[str], default: Config | None = None) -> Config:
    import tyro

    options = (tyro.conf.FlagCreatePairsOff,)
    if default is not None:
        return tyro.cli(config, prog=f"mpdqn {command}", args=flags, default=default, config=options)
    return tyro.cli(config, prog=f"mpdqn {command}", args=flags, config=options)


COMMANDS: Mapping[str, Callable[[list[str]], int | None]] = {
    "compare": _compare,
    "train": _train,
    "status": _status,
    "evaluate": _evaluate,
    "curves": _curves,
}
