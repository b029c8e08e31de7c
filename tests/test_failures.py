"""When a rank fails in the middle of a step: every rank ends in time, and the first cause is named with its action."""

from __future__ import annotations

import itertools
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mpdqn.dqn.agents import Agent
from mpdqn.launch import WorkerError
from mpdqn.learner import Learner
from mpdqn.mesh import World
from tests.distributed import run_ranks
from tests.test_launch import END_S, assert_nothing_left, end_processes
from tests.transparency import Case, build, filled_shards, owned_shards, tiny_case

pytestmark = pytest.mark.pool

TIMEOUT_S = 20.0
"""How long a rank waits for a message."""


class Refusing(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ZeroDivisionError("the cause,\nin two lines")


def kill(output: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return output


def fail(output: Tensor) -> Tensor:
    raise ZeroDivisionError("the cause,\nin two lines")


def fail_in_backward(output: Tensor) -> Tensor:
    refused: Tensor = Refusing.apply(output)
    return refused


def return_another_shape(output: Tensor) -> Tensor:
    return output[:, 1:]


@dataclass(frozen=True)
class Failure:
    """What the online network of stage ``stage`` in the last replica does in the forward of micro-batch 2 of the second
    update (in the loss, if ``what`` is), and how the error that is shown begins."""

    what: Any
    stage: int
    case: Case
    error: str

    def __str__(self) -> str:
        where = f"stage{self.stage}-dp{self.case.data}xpp{self.case.pipeline}-{self.case.schedule}"
        return f"{getattr(self.what, '__name__', self.what)}-{where}"


def own(action: str, schedule: str) -> str:
    return re.escape(
        f"failed: ZeroDivisionError: the cause,\nin two lines (in {action} (stage, kind, micro-batch) of {schedule})"
    )


def shape(action: str, schedule: str) -> str:
    promised = (
        rf"stage {action[0]} promised \[.*\] float64 for each micro-batch but returned \[.*\] float64 for {action}; "
    )
    return rf"failed: ValueError: {promised}.* \(in {action} \(stage, kind, micro-batch\) of {schedule}\)"


FAILURES = (
    Failure(kill, 0, tiny_case("td1f1b", lookahead=1), "rank 0 of 2 failed: killed by SIGKILL"),
    Failure(kill, 2, tiny_case("tdzb", pipeline=3, lookahead=1), "rank 2 of 3 failed: killed by SIGKILL"),
    Failure(fail, 1, tiny_case("td1f1b", pipeline=3, lookahead=1), "rank 1 of 3 " + own("1F2", "td1f1b")),
    Failure(fail, 2, tiny_case("zbv"), "rank 1 of 2 " + own("2F2", "zbv")),
    Failure("loss", 1, tiny_case("1f1b", data=2), "rank 3 of 4 " + own("1F2", "1f1b")),
    Failure(fail_in_backward, 0, tiny_case("tdzb", lookahead=1), "rank 0 of 2 " + own("0W2", "tdzb")),
    Failure(fail_in_backward, 3, tiny_case("zbv"), "rank 0 of 2 " + own("3I2", "zbv")),
    Failure(return_another_shape, 0, tiny_case("1f1b"), "rank 0 of 2 " + shape("0F2", "1f1b")),
    Failure(return_another_shape, 1, tiny_case("td1f1b", lookahead=1), "rank 1 of 2 " + shape("1F2", "td1f1b")),
)


def learn_until_it_fails(failure: Failure, folder: Path) -> None:
    torch.set_num_threads(1)
    case = failure.case
    world = World.open("cpu", TIMEOUT_S)
    learner = build(world, case, case.batch_size)
    assert learner is not None
    if learner.mesh.replica == case.data - 1 and failure.stage in learner.mesh.stages:
        arm(learner, failure, folder)
    shards = filled_shards(case)
    batches: list[Any] = [None] * 4
    if learner.owns_shards:
        batches = [shards.sample(case.batch_size, k, owned_shards(case, learner.mesh.replica)) for k in range(4)]
    for batch, upcoming in itertools.pairwise(batches):
        learner.learn(batch, upcoming if case.lookahead else None)


def arm(learner: Learner, failure: Failure, folder: Path) -> None:
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += learner.update == 1 and torch.is_grad_enabled()
        if calls != 3:
            return False
        (folder / "failed").write_text(str(time.time()))
        return True

    real = Agent.loss

    def loss(self: Agent, *args: Any) -> Any:
        return fail(args[0]) if due() else real(self, *args)

    if failure.what == "loss":
        patch.object(Agent, "loss", loss).start()
    else:
        online = next(stage.online for stage in learner.stages if stage.index == failure.stage)
        online.register_forward_hook(lambda module, inputs, output: failure.what(output) if due() else output)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own, in which `launch` puts its job, so that the workers' command lines name it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    end_processes(tmp_path)


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_failure_in_the_middle_of_a_step(failure: Failure, folder: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        run_ranks(learn_until_it_fails, failure, folder, num_ranks=failure.case.ranks, timeout=200)
    seconds = time.time() - float((folder / "failed").read_text())
    assert re.match(failure.error, str(caught.value)), str(caught.value)
    assert seconds < END_S
    assert_nothing_left(folder)
