"""The contenders of `experiments.pipeline_peers`: who they are, what they run on, and how their update is made."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from experiments.peers.data_parallel import data_parallel
from experiments.peers.deepspeed_pipeline import deepspeed_pipeline
from experiments.peers.mpdqn_layout import mpdqn_layout
from experiments.peers.one_process import one_process
from experiments.peers.task import Step, Task
from experiments.peers.torch_pipelining import torch_pipelining
from experiments.peers.torchgpipe_threads import torchgpipe_threads
from mpdqn.layouts import Layout

YARDSTICK = "one process"
"""Plain PyTorch with all threads, as published: what every other contender is measured and checked against."""

TUNED = ", tuned"
"""What follows the name of a contender that is tuned as far as its library goes along."""

CHECKED = 3
"""Updates whose losses must agree; from the second on they also depend on gradients and optimizer."""

TOLERANCE = 1e-4
"""How far a loss may be from the single process's; float32 sums in another order differ by about 1e-7."""

LAYOUTS = ("single@all", "dp2", "pp2-1f1b/m8", "pp2-td1f1b/m8")
"""The layouts of mpdqn that take part."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Its ``make`` is called in each of its ``ranks``; ``package`` is what must be installed for it, if anything."""

    make: Callable[[], Step]
    ranks: int
    threads: int
    num_microbatches: int
    package: str | None = None

    def missing(self) -> bool:
        """Whether its package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None


def contenders(task: Task, cores: int) -> dict[str, Contender]:
    """All contenders by name, in the order of their turns; every one has all ``cores``, shared among its ranks."""
    m, half = task.num_microbatches, max(1, cores // 2)
    alone = functools.partial(Contender, ranks=1, threads=cores)
    pair = functools.partial(Contender, ranks=2, threads=half)
    gpipe = functools.partial(torch_pipelining, task, schedule="gpipe", tuned=False)
    found: dict[str, Contender] = {}
    for suffix, tuned in (("", False), (TUNED, True)):
        plain = functools.partial(one_process, task, tuned=tuned, checked=CHECKED)
        replicas = functools.partial(data_parallel, task, tuned=tuned)
        one_f_one_b = functools.partial(torch_pipelining, task, schedule="1f1b", tuned=tuned)
        engine = functools.partial(deepspeed_pipeline, task, tuned=tuned)
        chunks = functools.partial(torchgpipe_threads, task, tuned=tuned)
        found |= {
            f"{YARDSTICK}{suffix}": alone(make=plain, num_microbatches=1),
            f"torch DistributedDataParallel{suffix}": pair(make=replicas, num_microbatches=1),
            **({} if tuned else {"torch ScheduleGPipe": pair(make=gpipe, num_microbatches=m)}),
            f"torch Schedule1F1B{suffix}": pair(make=one_f_one_b, num_microbatches=m),
            f"DeepSpeed PipelineModule{suffix}": pair(make=engine, num_microbatches=m, package="deepspeed"),
            f"torchgpipe{suffix}": alone(make=chunks, num_microbatches=m, package="torchgpipe"),
        }
    for name in LAYOUTS:
        layout = Layout.parse(name, cores=cores)
        found[f"mpdqn {name}"] = Contender(
            make=functools.partial(mpdqn_layout, name, task),
            ranks=layout.ranks,
            threads=layout.threads,
            num_microbatches=layout.num_microbatches,
        )
    return found


def versions() -> str:
    """The versions of the optional peers."""
    known = []
    for package in ("torchgpipe", "deepspeed"):
        try:
            known.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            known.append(f"no {package}")
    return ", ".join(known)


def check_losses(losses: Mapping[str, list[float]]) -> None:
    """Raise ValueError unless every contender's losses are those of the `YARDSTICK`: else it is another update."""
    for name, own in losses.items():
        for update, (loss, reference) in enumerate(zip(own, losses[YARDSTICK], strict=True), start=1):
            if not math.isclose(loss, reference, rel_tol=0.0, abs_tol=TOLERANCE):
                raise ValueError(
                    f"{name} has loss {loss:.6f} in update {update}, but {YARDSTICK} has {reference:.6f}: they do not "
                    "compute the same update, and their speeds cannot be compared"
                )
