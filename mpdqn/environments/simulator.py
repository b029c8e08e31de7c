"""`Simulator`: one Gymnasium environment with pixels, played by choices and seeded by episode. It needs no torch."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from mpdqn.environments.contexts import drawn_by_mujoco, keep_current
from mpdqn.environments.discretize import BINS, ActionCode
from mpdqn.environments.pixels import PixelFormat
from mpdqn.environments.spec import EnvironmentSpec

PROCESS = threading.RLock()
"""Held by whoever changes what belongs to the whole process (its environment variables, stdout, other simulators'
classes) for a while, as acting and evaluation may each simulate in a thread of their own."""

Transition = tuple[NDArray[np.uint8], float, bool, bool]
"""One step's frame uint8 [C, H, W], reward, terminated and truncated."""


def unchanged(environment: Any) -> Any:
    """The environment as it is made."""
    return environment


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """How one Gymnasium environment is made and played; pickles, for workers.

    ``make`` its id or Gymnasium's own spec of it, with ``arguments``; ``imports`` modules that register it; ``guard``
    is around its making, and ``adapt`` is given what was made. ``pictures``: "observed" or "rendered" ones. An action
    is taken ``frames_per_action`` times, its rewards are added, and the last picture is kept. ``variables`` are set in
    the process environment while it is made and first drawn, where they are not set already. ``apart``: it is always
    played in a worker process, since what it draws with belongs to one thread.
    """

    name: str
    make: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    adapt: Callable[[Any], Any] = unchanged
    pictures: str = "observed"
    format: PixelFormat = field(default_factory=PixelFormat)
    frames_per_action: int = 1
    bins: int = BINS
    variables: Callable[[], Mapping[str, str]] = dict
    apart: bool = False


@dataclass(frozen=True, kw_only=True)
class SimulatedKind:
    """A kind of environment that Python simulates: what is known of it, how it is played, and the extra it needs."""

    spec: EnvironmentSpec
    config: SimulatorConfig
    extra: str = ""
    modules: tuple[str, ...] = ()

    def with_bins(self, bins: int) -> SimulatedKind:
        """The same with ``bins`` values for each continuous dimension."""
        return replace(self, spec=replace(self.spec, num_actions=bins), config=replace(self.config, bins=bins))


class Simulator:
    """One environment in this process.

    Args:
        config: which, and how.

    Raises:
        ValueError: if Gymnasium cannot make it, or its actions cannot be discretised.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self.environment = make(config)
        self.actions = ActionCode(self.environment.action_space, bins=config.bins, name=config.name)
        self._drawn = False

    def begin(self, seed: int) -> NDArray[np.uint8]:
        """Begin the episode that ``seed`` names; its first frame [C, H, W].

        Raises:
            RuntimeError: if MuJoCo draws nothing.
        """
        with contextlib.nullcontext() if self._drawn else quiet(self._config.variables()):
            observation, _ = self.environment.reset(seed=seed)
            frame = self._frame(observation)
        self._drawn = True
        if not frame.any() and drawn_by_mujoco(self.environment):
            # What a context that is lost draws, without an error: training on it would be for nothing.
            raise RuntimeError(f"the first picture of environment {self._config.name!r} is black: MuJoCo cannot draw")
        return frame

    def step(self, action: int | NDArray[np.int64]) -> Transition:
        """Take the choice ``action``."""
        observation, reward, terminated, truncated = self._act(action)
        return self._frame(observation), reward, terminated, truncated and not terminated

    def replay(self, seed: int, actions: list[Any]) -> NDArray[np.uint8]:
        """Go where ``actions`` lead from the beginning that ``seed`` names; the last frame, all that is drawn there."""
        frame = self.begin(seed)
        for action in actions:
            observation, *_ = self._act(action)
        return self._frame(observation) if actions else frame

    def close(self) -> None:
        """Free the environment."""
        self.environment.close()

    def _act(self, action: int | NDArray[np.int64]) -> tuple[Any, float, bool, bool]:
        decoded, total = self.actions.decode(action), 0.0
        for _ in range(self._config.frames_per_action):
            observation, reward, terminated, truncated, _ = self.environment.step(decoded)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, bool(terminated), bool(truncated)

    def _frame(self, observation: Any) -> NDArray[np.uint8]:
        picture = self.environment.render() if self._config.pictures == "rendered" else observation
        return self._config.format.frame(picture)


def make(config: SimulatorConfig) -> Any:
    """The Gymnasium environment of ``config``.

    Raises:
        ValueError: if it cannot be made, with Gymnasium's reason.
    """
    with quiet(config.variables()):
        try:
            for module in config.imports:
                import_module(module)
            with config.guard():
                made = gymnasium.make(config.make, disable_env_checker=True, **config.arguments)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"environment {config.name!r} cannot be made: {error}") from error
    adapted = config.adapt(made)
    if drawn_by_mujoco(adapted):
        keep_current(adapted)
    return adapted


@contextlib.contextmanager
def quiet(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment ``variables`` where they are not set; greetings to stdout and known warnings of imports held back.

    One thread at a time: two that overlap would put back each other's.
    """
    with PROCESS:
        own = {name: value for name, value in variables.items() if name not in os.environ}
        os.environ.update(own)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                # Box2D's SWIG types, on import.
                warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
                yield
        finally:
            for name in own:
                os.environ.pop(name, None)
