"""The `mpdqn` command."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import tyro

from mpdqn.bench.compare import compare
from mpdqn.bench.config import CompareConfig
from mpdqn.launch import GRACE_S, WorkerError
from mpdqn.mesh import PeerLost, launched_rank

USAGE = """usage: mpdqn compare [flags]

  compare   measure data- and pipeline-parallel training of one network, side by side (mpdqn compare --help)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: those of this process); returns the exit code.

    0 is success, 2 bad input or a failed worker with one line of why, 130 an interruption.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command != "compare":
        print(f"mpdqn: unknown command {command!r}\n{USAGE}", end="", file=sys.stderr)
        return 2
    config = tyro.cli(CompareConfig, prog="mpdqn compare", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        comparison = compare(config)
    except (ValueError, OSError, WorkerError) as error:
        notes = "".join(getattr(error, "__notes__", ()))
        print(f"mpdqn compare: {error}{notes}", file=sys.stderr)
        return 2
    except PeerLost as error:  # under torchrun, where no parent of ours sorts causes from consequences
        print(f"mpdqn compare: {error}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
        os._exit(2)  # the ordinary way out would wait for peers that are gone
    except KeyboardInterrupt:
        print("mpdqn compare: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if launched_rank() == 0:
        print(f"\n{comparison.table.markdown()}\n{comparison.verdict}\n\nWritten to {comparison.folder}/")
    return 0
