"""Refusals and warnings that `train` and `compare` share: one line, before any work."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpdqn.launched import launched_rank
from mpdqn.layouts import Layout
from mpdqn.mesh import check_device
from mpdqn.plan import RECOMPUTATION
from mpdqn.schedule import SCHEDULES
from mpdqn.workload.workload import Workload

PRECISIONS = ("float32", "tf32", "bf16", "auto")
COMPILATION = ("auto", "on", "off")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raise ValueError if a setting of ``config`` in ``names`` is below ``least``; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value} but must be at least {least:g}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_update(config: Any, *recomputation: str) -> None:
    """Raise ValueError unless ``config`` has a lookahead, recompute and timeout that an update can have.

    ``recomputation`` are choices beside those that every stage can have.
    """
    check_binary(config, "lookahead")
    check_choice("recompute", config.recompute, (*RECOMPUTATION, *recomputation))
    if not 0 < config.timeout < float("inf"):
        raise ValueError(f"timeout is {config.timeout} s but must be above 0 and finite")


def check_binary(config: Any, name: str) -> None:
    """Raise ValueError unless the setting ``name`` of ``config`` is 0 or 1."""
    if getattr(config, name) not in (0, 1):
        raise ValueError(f"{name} is {getattr(config, name)} but must be 0 or 1")


def check_arithmetic(*, device: str, precision: str, compile: str, dtype: str = "float32") -> None:
    """Raise ValueError unless layers of ``dtype`` can be computed so on ``device``, and torch sees the device."""
    check_choice("precision", precision, PRECISIONS)
    check_choice("compile", compile, COMPILATION)
    if dtype == "float64" and precision not in ("auto", "float32"):
        raise ValueError(f"precision {precision} has no effect on dtype float64; leave one of them")
    if device == "cpu" and precision == "tf32":
        raise ValueError("precision tf32 is CUDA's, and --device is cpu; use float32 or bf16")
    check_device(device)


def check_actions(workload: Workload) -> None:
    """Raise ValueError unless the agent chooses actions of as many dimensions as the environment has."""
    spec, agent = workload.spec, workload.agent
    if spec.branches and not agent.branching:
        raise ValueError(
            f"environment {workload.env} has {spec.branches} action dimensions of {spec.num_actions} choices each, but "
            f"agent {agent.name} has one head of discrete actions; use --agent decqn, whose head branches"
        )
    if agent.branching and not spec.branches:
        raise ValueError(
            f"agent {agent.name} has a branching head but environment {workload.env} has 1 discrete action of "
            f"{spec.num_actions} choices; use --agent dqn or another without branches"
        )


def check_gpu_sharing(layout: Layout, ranks: int, devices: int) -> None:
    """Raise ValueError if ``layout`` sends messages between ranks that share a GPU.

    NCCL refuses two ranks on one GPU, and gloo sends from host memory only.

    Args:
        layout: what is to run.
        ranks: ranks on one host.
        devices: GPUs of that host; 0 on the CPU.
    """
    if 0 < devices < ranks and layout.pipeline > 1 and not layout.stacked:
        raise ValueError(
            f"layout {layout.name} sends messages between GPUs but {ranks} ranks share {devices} here; write +stacked, "
            "as in pp2-1f1b+stacked, or choose a layout of fewer ranks"
        )


def check_division(layout: Layout, workload: Workload) -> None:
    """Raise ValueError unless ``layout`` cuts the batch and deals the shards evenly."""
    layout.parallelism.check_batch(workload.settings.batch_size)
    layout.parallelism.check_shards(workload.num_shards, workload.settings.batch_size)


def check_stages(layouts: Iterable[Layout], network: nn.Sequential, name: str) -> None:
    """Raise ValueError if a layout has more stages than ``network``, called ``name``, has layers to train."""
    trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in network)
    for layout in layouts:
        if layout.parallelism.num_stages > trained:
            raise ValueError(
                f"layout {layout.name} wants p·v = {layout.parallelism.num_stages} stages but {name} has "
                f"{len(network)} layers in its nn.Sequential, {trained} of them with parameters to train, and every "
                "stage needs one; use at most that many stages, or return a flat nn.Sequential of more layers"
            )


def warn_of_gaps(layouts: Iterable[Layout], lookahead: int) -> None:
    """Warn, on rank 0, of schedules that fill their gaps with passes over a batch that ``lookahead`` 0 never has."""
    filled = [row.name for row in layouts if SCHEDULES[row.schedule].filled and row.pipeline > 1]
    if filled and not lookahead and launched_rank() == 0:
        warnings.warn(
            f"with --lookahead 0 no target pass can run ahead, so no gaps are filled in {', '.join(filled)}; set "
            "--lookahead 1",
            stacklevel=3,
        )


def check_writable(out: Path, flag: str = "--out") -> None:
    """Raise ValueError unless files can be made in the folder ``out`` of ``flag``; it is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".writable-"):  # a name that no other host has either
            pass
    except OSError as error:
        raise ValueError(f"{flag} {out} cannot be written ({error.strerror}); choose another folder") from error
