"""Autonomous driving: highway-env (Leurent 2018) in grey pictures, and CarRacing with five discrete actions.

highway-env draws what its `GrayscaleObservation` describes, 84 × 84 at 1.75 pixels a metre: 48 m of road. One decision
(change lane, faster, slower, idle) lasts a second of traffic and is one frame. CarRacing shows 96 × 96, of which the
84 × 84 above the dashboard are kept, so that nothing is blurred; 4 frames per action, as in the games.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from mpdqn.environments.pixels import PixelFormat
from mpdqn.environments.simulator import SimulatedKind, SimulatorConfig
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


class Upright(gymnasium.ObservationWrapper):  # type: ignore[misc]
    """highway-env's one-frame stack [1, W, H], lying on its side, as a picture [H, W]."""

    def observation(self, observation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture."""
        picture: NDArray[np.uint8] = observation[0].T
        return picture


def _window() -> Mapping[str, str]:
    # pygame draws off screen, but its first surface asks for a display all the same.
    return {"SDL_VIDEODRIVER": "dummy"}


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
            format=PixelFormat(grey=True, size=None, crop=(0, SIZE, 6, 6 + SIZE)),
            frames_per_action=4,
            variables=_window,
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
            adapt=Upright,
            format=PixelFormat(grey=True, size=None),
            variables=_window,
        ),
    )
