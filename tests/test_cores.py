"""Pinning and peak memory, in processes of their own: both would outlast the test; and a rank's share of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpdqn.cores import memory_per_rank

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.cores


def in_a_process(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PIN = """
import json, os, threading
from pathlib import Path
import torch
from mpdqn.cores import pin

cores = sorted(os.sched_getaffinity(0))
torch.set_num_threads(len(cores))
x = torch.randn(256, 256)
x @ x                                                  # OpenMP's threads start here
end = threading.Event()
threading.Thread(target=end.wait, daemon=True).start()
threads = [int(t.name) for t in Path("/proc/self/task").iterdir()]
seen = []
for share, rank in ((1, 0), (1, 1), (len(cores), 0), (1, len(cores)), (len(cores) + 1, 3)):
    pin(cores, share, rank)
    where = {tuple(sorted(os.sched_getaffinity(t))) for t in threads}
    x @ x
    seen.append([torch.get_num_threads(), [list(w) for w in where]])
end.set()
print(json.dumps([cores, len(threads), seen]))
"""


def test_every_thread_is_moved_to_the_ranks_own_cores() -> None:
    cores, threads, seen = in_a_process(PIN)
    n = len(cores)
    assert threads >= 2
    assert seen == [
        [1, [[cores[0]]]],
        [1, [[cores[1 % n]]]],
        [n, [cores]],
        [1, [[cores[0]]]],  # one rank more than cores: they wrap around
        [n + 1, [cores]],
    ]


MEMORY = """
import json, torch
from mpdqn.cores import peak_memory, reset_peak_memory

device, size = torch.device("{device}"), 256 * 2**20
torch.empty(1, device=device)
reset_peak_memory(device)
seen = [peak_memory(device)]
x = torch.ones(size // 4, device=device)
seen.append(peak_memory(device))
del x
seen.append(peak_memory(device))
reset_peak_memory(device)
seen.append(peak_memory(device))
print(json.dumps([(value - seen[0]) / size for value in seen]))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_peak_rises_stays_and_is_reset(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    _, held, freed, reset = in_a_process(MEMORY.format(device=device))
    assert held == pytest.approx(1.0, abs=0.05)
    assert freed == pytest.approx(held, abs=0.02)
    assert reset == pytest.approx(0.0, abs=0.05)


def test_the_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    whole = memory_per_rank(1, cpu)
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_per_rank(4, cpu) == whole / 4
    # No test needs a GPU to know how many ranks share one: 80 GiB each, two of them.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert [memory_per_rank(ranks, cuda) / 2**30 for ranks in (1, 2, 3, 4)] == [80, 80, 40, 40]
