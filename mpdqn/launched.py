"""Reads RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, which torchrun and our own pool set for each process."""

from __future__ import annotations

import os


def launched() -> bool:
    """Return whether a launcher (torchrun, or mpdqn's own pool) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """Return this process's rank as the launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_world_size() -> int:
    """Return the number of those processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_world_size()))
