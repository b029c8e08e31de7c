"""Autonomous driving: highway-env (Leurent 2018) in grey pictures, and CarRacing with five discrete actions.

highway-env draws what its `GrayscaleObservation` describes, 84 × 84 at 1.75 pixels a metre: 48 m of road. One decision
(change lane, faster, slower, idle) lasts a second of traffic and is one frame. CarRacing shows 96 × 96, of which the
84 × 84 above the dashboard are kept, so that nothing is blurred; 4 frames per action, as in the games.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from mpdqn.environments.pixels import PixelFormat
from mpdqn.environments.simulator import PROCESS, SimulatedKind, SimulatorConfig
from mpdqn.environments.spec import EnvironmentSpec

STACK = 4
SIZE = 84
_SCENES = {  # short name: Gymnasium's id, number of actions
    "highway": ("highway-v0", 5),
    "highway-fast": ("highway-fast-v0", 5),
    "merge": ("merge-v1", 5),
    "roundabout": ("roundabout-v1", 5),
    "intersection": ("intersection-v2", 3),
    "exit": ("exit-v1", 5),
    "two-way": ("two-way-v0", 5),
    "u-turn": ("u-turn-v1", 5),
}
_OBSERVATION = {
    "type": "GrayscaleObservation",
    "observation_shape": (SIZE, SIZE),
    "stack_size": 1,
    "weights": [0.2989, 0.5870, 0.1140],
    "scaling": 1.75,
}


class Scene(gymnasium.ObservationWrapper):  # type: ignore[misc]
    """A scene of highway-env as a picture [H, W], standing upright, whatever else this process plays or is set to.

    highway-env's own observation is a stack of one, [1, W, H], lying on its side.
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._changed: dict[tuple[type, str], Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode, with a new surface to draw on, which needs no screen."""
        with own_manners(self._changed), _offscreen():
            return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """One decision."""
        with own_manners(self._changed):
            return super().step(action)

    def close(self) -> None:
        """Free the surface, which ends pygame for the whole process: not while another scene is drawn."""
        with PROCESS:
            super().close()

    def observation(self, observation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture."""
        picture: NDArray[np.uint8] = observation[0].T
        return picture


class Race(gymnasium.Wrapper):  # type: ignore[misc]
    """CarRacing, played by one thread of this process at a time: pygame's polygons are not safe to draw in several."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode."""
        with PROCESS:
            return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """Take one action."""
        with PROCESS:
            return super().step(action)

    def close(self) -> None:
        """Free what it draws on, not while another thread draws."""
        with PROCESS:
            super().close()


@contextlib.contextmanager
def own_manners(changed: dict[tuple[type, str], Any] | None = None) -> Iterator[None]:
    """Have the other vehicles drive as ``changed`` says inside, which is brought up to date, and as before outside.

    Some scenes (intersection) set how the vehicles drive as attributes of their *class*, which all later scenes of the
    process would then share: an episode would depend on what was played before it. One thread at a time is inside.
    """
    changed = {} if changed is None else changed
    with PROCESS:
        before = _manners()
        for (vehicle, name), value in changed.items():
            setattr(vehicle, name, value)
        try:
            yield
        finally:
            now = _manners()
            changed.clear()
            changed |= {key: value for key, value in now.items() if key not in before or before[key] is not value}
            for vehicle, name in changed:
                if (vehicle, name) in before:
                    setattr(vehicle, name, before[vehicle, name])
                else:
                    delattr(vehicle, name)


def _manners() -> dict[tuple[type, str], Any]:
    """The constants of all classes of vehicles that drive by themselves."""
    behavior = sys.modules["highway_env.vehicle.behavior"]
    vehicles = [value for value in vars(behavior).values() if isinstance(value, type)]
    return {(v, name): value for v in vehicles for name, value in vars(v).items() if name.isupper()}


@contextlib.contextmanager
def _offscreen() -> Iterator[None]:
    # With the driver "dummy", which people set on servers, highway-env draws nothing at all: black pictures.
    old = os.environ.get("SDL_VIDEODRIVER")
    os.environ["SDL_VIDEODRIVER"] = "offscreen"
    try:
        yield
    finally:
        os.environ.pop("SDL_VIDEODRIVER")
        if old is not None:
            os.environ["SDL_VIDEODRIVER"] = old


def scenes() -> dict[str, SimulatedKind]:
    """All named scenes by their short names."""
    found = {name: _scene(name, gymnasium_id, num_actions) for name, (gymnasium_id, num_actions) in _SCENES.items()}
    found["car-racing"] = SimulatedKind(
        extra="driving",
        modules=("Box2D", "pygame"),
        spec=EnvironmentSpec(
            name="car-racing",
            observation_shape=(STACK, SIZE, SIZE),
            num_actions=5,
            stack=STACK,
            frames_per_action=4,
            field="driving",
        ),
        config=SimulatorConfig(
            name="car-racing",
            make="CarRacing-v3",
            arguments={"continuous": False},
            adapt=Race,
            format=PixelFormat(grey=True, size=None, crop=(0, SIZE, 6, 6 + SIZE)),
            frames_per_action=4,
        ),
    )
    return found


def _scene(name: str, gymnasium_id: str, num_actions: int) -> SimulatedKind:
    settings: dict[str, Any] = {"observation": _OBSERVATION, "offscreen_rendering": True}
    return SimulatedKind(
        extra="driving",
        modules=("highway_env", "pygame"),
        spec=EnvironmentSpec(
            name=name,
            observation_shape=(STACK, SIZE, SIZE),
            num_actions=num_actions,
            stack=STACK,
            frames_per_action=1,
            field="driving",
        ),
        config=SimulatorConfig(
            name=name,
            make=gymnasium_id,
            arguments={"config": settings},
            imports=("highway_env",),
            guard=own_manners,
            adapt=Scene,
            format=PixelFormat(grey=True, size=None),
        ),
    )
