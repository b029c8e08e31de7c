"""A rank's share of the machine: its cores, its threads, its memory."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from pathlib import Path

import torch

from mpdqn.allocator import release_freed_memory


def pin(cores: list[int], share: int, rank: int) -> None:
    """Give this process ``share`` threads on ``share`` of ``cores``: rank 0 the first ones, rank 1 the next, and so on.

    Where the ranks want more cores than there are, they wrap around and share.
    """
    own = {cores[(rank * share + i) % len(cores)] for i in range(share)}
    torch.set_num_threads(share)
    # Threads that the process started earlier (OpenMP's, gloo's) keep their own affinity: move each of them.
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread.name), own)


def restore(cores: set[int], threads: int) -> None:
    """Undo `pin`: give this process, with all the threads that it has, ``cores`` and torch ``threads`` threads."""
    torch.set_num_threads(threads)
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: hand unused memory back to the system, then reset the kernel's (or CUDA's) high-water mark."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The peak since `reset_peak_memory`, in bytes: resident memory of this process, or allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_per_rank(ranks: int, device: torch.device) -> float:
    """Bytes that each of ``ranks`` processes of this host may use: an equal share of its GPU's memory or the host's."""
    if device.type == "cuda":
        on_one = math.ceil(ranks / torch.cuda.device_count())
        return torch.cuda.get_device_properties(device).total_memory / on_one
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
