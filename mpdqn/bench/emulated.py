"""Emulated devices: stages that sleep for as long as a profiled stage would compute.

Sleeping takes no core, so that p = 4 or 8 stages run as real processes, with real messages, on two cores. What is
measured so is *emulated*, and its tables say so.

    forward    x ── h ┐                            backward   ∂x ◀── h, backward_input_s ──┐
               w ── v ┴─ y = h·v, forward_s                   ∂w ◀── v, backward_weight_s ─┴─ ∂y

Input and weight have nodes of their own, so that a split backward (I and W) sleeps for each part where it belongs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpdqn.schedule import ActionTimes
from mpdqn.schedule.actions import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, RECOMPUTE

FRAMES = (1, 2, 2)
"""C, H, W of the frames that an emulated network takes: the messages are tiny, so that only their latency counts."""

WIDTH = 4
"""Features between two stages, and actions at the end."""

MOST_LATE = 0.005
"""Seconds of a late wake-up that later sleeps make up for."""


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """How long an emulated stage takes for one micro-batch, in seconds; any no-gradient pass takes a forward."""

    forward_s: float
    backward_input_s: float
    backward_weight_s: float

    @property
    def backward_s(self) -> float:
        """The whole backward."""
        return self.backward_input_s + self.backward_weight_s


class Sleeper:
    """A device's sleep, on average as long as requested: what one sleep was too long, the next ones are shorter.

    A sleeping process wakes up about 0.1 ms late, and on a busy machine when a core is free for it. An emulated device
    needs no core, so that is no time of its own. More than `MOST_LATE` is not made up for: what follows a longer stall
    would seem too fast. ``shortened_s`` counts what was made up for, and tables print it.
    """

    def __init__(self) -> None:
        self.shortened_s = 0.0
        """Seconds by which late wake-ups have shortened later sleeps so far."""
        self._late = 0.0

    def sleep(self, seconds: float, since: float | None = None) -> None:
        """Sleep for ``seconds``, counted from ``since`` (`time.perf_counter`) or from now."""
        now = time.perf_counter()
        due = (now if since is None else since) + seconds
        until = due - self._late
        self.shortened_s += max(0.0, due - max(until, now))
        time.sleep(max(0.0, until - now))
        self._late = min(time.perf_counter() - until, MOST_LATE)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # the target network sleeps on the same device


class _SleepInBackward(torch.autograd.Function):
    """The identity, whose backward sleeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleeper: Sleeper, seconds: float) -> Tensor:
        ctx.sleeper, ctx.seconds = sleeper, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.sleeper.sleep(ctx.seconds)
        return grads[0], None, None


class EmulatedStage(nn.Module):
    """A stage that multiplies its input by a tiny matrix and sleeps for the rest.

    Where nobody wants the gradient of the input, as of the frames before the first stage, the whole backward is in the
    part of the weights.
    """

    def __init__(self, seconds: StageSeconds, sleeper: Sleeper) -> None:
        super().__init__()
        self.seconds, self.sleeper = seconds, sleeper
        # Without randomness every rank has the same; no row and no column is like another.
        self.weight = nn.Parameter(torch.eye(WIDTH) + torch.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH) / 100)

    def forward(self, x: Tensor) -> Tensor:
        """[b, …] of `WIDTH` numbers a row, uint8 frames or float, to [b, `WIDTH`] float."""
        begin = time.perf_counter()
        h = x.flatten(1)
        if not h.is_floating_point():
            h = h.to(self.weight.dtype) / 255
        v: Tensor = self.weight
        if torch.is_grad_enabled():
            seconds = self.seconds
            for_weight = seconds.backward_weight_s if h.requires_grad else seconds.backward_s
            h = _sleep_in_backward(h, self.sleeper, seconds.backward_input_s)
            v = _sleep_in_backward(v, self.sleeper, for_weight)
        y = h @ v
        self.sleeper.sleep(self.seconds.forward_s, since=begin)
        return y


def emulated_network(stages: Sequence[StageSeconds], sleeper: Sleeper | None = None) -> nn.Sequential:
    """A network of one layer for each of ``stages``: uint8 [b, *`FRAMES`] to [b, `WIDTH`] float.

    ``sleeper`` is the device that they and their copies run on; by default one of their own.
    """
    sleeper = sleeper or Sleeper()
    return nn.Sequential(*(EmulatedStage(seconds, sleeper) for seconds in stages))


def emulated_times(stages: Sequence[StageSeconds], letters: str) -> ActionTimes:
    """What the actions of `emulated_network` take, for the simulator; ``letters`` are the no-gradient passes."""
    seconds: dict[str, tuple[float, ...]] = dict.fromkeys(
        (FORWARD, RECOMPUTE, *letters), tuple(stage.forward_s for stage in stages)
    )
    seconds[BACKWARD] = tuple(stage.backward_s for stage in stages)
    seconds[BACKWARD_INPUT] = (0.0, *(stage.backward_input_s for stage in stages[1:]))
    seconds[BACKWARD_WEIGHT] = (stages[0].backward_s, *(stage.backward_weight_s for stage in stages[1:]))
    return ActionTimes(seconds=seconds)


def _sleep_in_backward(x: Tensor, sleeper: Sleeper, seconds: float) -> Tensor:
    slept: Tensor = _SleepInBackward.apply(x, sleeper, seconds)
    return slept
