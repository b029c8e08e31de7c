"""What is timed is what training does: nothing in the timed loop waits for the device, batches come the same way.

No GPU is needed to see the order of calls; what a wait costs there is not measured here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpdqn.bench import turn as module
from mpdqn.bench.comparison import compare_table
from mpdqn.learner import Learner
from mpdqn.networks import make_network
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.records import Record
from mpdqn.replay import VirtualShards
from tests.bench.in_process import compared

STEPS = 3


class Watched:
    """Names of the calls of a comparison, in their order, and the state of cuDNN at each forward pass."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cudnn: set[bool] = set()
        self.records: list[Record] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, label: str) -> None:
        """Note each call of ``owner.name`` as ``label``, with its thread."""
        real: Callable[..., Any] = getattr(owner, name)

        def noted(*args: Any, **settings: Any) -> Any:
            thread = threading.current_thread().name.split("_")[0]
            self.calls.append(label if thread == "MainThread" else f"{label} in {thread}")
            return real(*args, **settings)

        monkeypatch.setattr(owner, name, noted)

    @property
    def timed(self) -> list[str]:
        """The calls from the synchronisation before the timed updates on."""
        return self.calls[self.calls.index("synchronize") :]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One comparison of one layout in bfloat16, in which each update reads a batch one update early."""
    found = Watched()

    class Probe(nn.Module):
        """Notes whether cuDNN is on."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.cudnn.add(torch.backends.cudnn.enabled)
            return x

    def network(shape: tuple[int, int, int], actions: int) -> nn.Module:
        return nn.Sequential(Probe(), *make_network("minatar", shape, actions).children())

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, label in (
            (Learner, "learn", "learn"),
            (Stopwatch, "timeline", "read the stopwatch"),
            (VirtualShards, "gather", "gather"),
            (VirtualShards, "return_td_errors", "return TD errors"),
            (module, "synchronize", "synchronize"),
        ):
            found.watch(patch, owner, name, label)
        out = tmp_path_factory.mktemp("compared")
        found.records = compared(out, network, env="minatar-breakout", steps=STEPS, precision="bf16")
    return found


def test_nothing_is_read_back_while_the_updates_are_timed(watched: Watched) -> None:
    """`timeline` waited for every update, and TD errors were fetched after each."""
    update = ["gather in prefetch", "learn"]
    assert watched.timed == ["synchronize", *update * STEPS, "synchronize", *["read the stopwatch"] * STEPS]
    assert "return TD errors" not in watched.calls, "sampling is uniform"


def test_the_check_leaves_cudnn_on(watched: Watched) -> None:
    """``cudnn.flags(allow_tf32=False)`` also has ``enabled=False``: gradients were those of other kernels."""
    assert watched.cudnn == {True}


def test_layouts_are_timed_in_the_precision_that_is_asked_and_checked_in_float32(watched: Watched) -> None:
    (record,) = watched.records
    assert record.settings["precision"] == "bf16"
    assert 0 < record.values["gradient_error"] < 5e-5, "bfloat16 alone is wrong by some 1e-3"  # type: ignore[operator]
    assert re.search(r"\(gloo, (contiguous|channels_last), bf16\), agent", compare_table(watched.records).notes[0])


def test_every_turn_of_every_row_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles 8 variants of one piece of code and runs the rest as it is, with a line in its log.

    The stages of all rows and rounds would share the 8. Dynamo is real here; its eager backend saves the compiler.
    """
    real = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: real("eager"))
    layouts = ["single@1", "pp2-1f1b+stacked/m2"]
    records = compared(tmp_path, "minatar", env="minatar-breakout", layouts=layouts, rounds=2, compile="on")
    assert {record.settings["precision"] for record in records} == {"float32, compiled"}
    modules = [record.values["compiled_modules"] for record in records]
    assert modules == 2 * [[3], [2 * 3]], "rounds × rows, each stages × passes T, D and F"
