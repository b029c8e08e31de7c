"""Runs that are stopped after a given round, as by SIGTERM, and gone on with."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

from mpdqn.mesh import World
from mpdqn.train import TrainConfig, TrainResult
from mpdqn.train import run as running
from mpdqn.train.check import check
from mpdqn.train.run import train_in
from mpdqn.train.stop import StopSignal


class StopAfter(StopSignal):
    """As if SIGTERM came in round ``round``, counted from where the run begins."""

    def __init__(self, rounds: int) -> None:
        self._left = rounds
        super().__init__()

    @property
    def received(self) -> bool:  # type: ignore[override]
        self._left -= 1
        return self._left < 0

    @received.setter
    def received(self, value: bool) -> None:
        """It begins as not received."""


def train_for(world: World, config: TrainConfig, rounds: int) -> TrainResult:
    """Train until a SIGTERM after so many rounds, in a world that is open."""
    with patch.object(running, "StopSignal", lambda: StopAfter(rounds)):
        return train_in(world, check(config))


def train_parts(world: World, config: TrainConfig, rounds: list[int]) -> list[TrainResult]:
    """Train for ``rounds[0]`` rounds, go on for ``rounds[1]`` … and in the end to the end."""
    results = [train_for(world, config, rounds[0])]
    for length in [*rounds[1:], 10**9]:
        going_on = replace(config, resume=world.from_first(results[-1].folder))
        results.append(train_for(world, going_on, length))
    return results
