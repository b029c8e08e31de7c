"""What a launcher tells this process: RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, as torchrun and our own pool set them."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher (torchrun, or mpdqn's own pool) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """This process's rank as the launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_world_size() -> int:
    """The number of those processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_world_size()))
