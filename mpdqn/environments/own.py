"""Any Gymnasium environment with pixels by its id, one's own included: `own_kind` sees how it can be played.

    observation   uint8 [H, W], [H, W, 1] or [H, W, 3]  ─▶  grey, at most 84 × 84, stacks of 4
    action        Discrete, as it is · MultiDiscrete with equal sizes, as branches · Box, as branches of 3 values each

Frame skips and limits are the environment's own: register it with the wrappers that it needs.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mpdqn.environments.contexts import drawn_by_mujoco
from mpdqn.environments.discretize import BINS, ActionCode
from mpdqn.environments.pixels import default_format
from mpdqn.environments.simulator import SimulatedKind, SimulatorConfig, make
from mpdqn.environments.spec import EnvironmentSpec

STACK = 4


def module_of(name: str) -> str:
    """The module that is imported for the environment ``name``, which may be any code; empty for none."""
    return name.rpartition(":")[0]


def find_registered(name: str) -> Any | None:
    """Gymnasium's own spec of ``"Id-v0"`` or ``"module:Id-v0"``, the module imported; None if there is no such id.

    Raises:
        ValueError: if the module cannot be imported.
    """
    module, gymnasium_id = module_of(name), name.rpartition(":")[2]
    if module:
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(f"environment {name!r} is registered by no module {module!r}: {error}") from error
    return gymnasium.registry.get(gymnasium_id)


def own_kind(name: str, registered: Any, *, bins: int = BINS) -> SimulatedKind:
    """How the environment ``name`` is played. It is made once, to see its spaces, and closed.

    Args:
        name: as the user gave it.
        registered: Gymnasium's spec of it, which workers are given too: they have no other way to an environment that
            was registered in the user's own script.
        bins: values in each dimension of a continuous action.

    Raises:
        ValueError: if it cannot be made, shows no pixels, or has actions that cannot be discretised.
    """
    module = module_of(name)
    config = SimulatorConfig(name=name, make=registered, imports=(module,) if module else (), bins=bins)
    environment = make(config)
    try:
        pixels, actions = environment.observation_space, ActionCode(environment.action_space, bins=bins, name=name)
        apart = drawn_by_mujoco(environment)
    finally:
        environment.close()
    if not _shows_pixels(pixels):
        raise ValueError(
            f"environment {name!r} observes {pixels}, but pixels are needed, uint8 [H, W] or [H, W, 1 or 3]; wrap it, "
            "for one that can draw itself in gymnasium.wrappers.AddRenderObservation, and register that"
        )
    assert pixels.shape is not None
    form = default_format(pixels.shape)
    channels, height, width = form.frame_shape(pixels.shape)
    return SimulatedKind(
        spec=EnvironmentSpec(
            name=name,
            observation_shape=(STACK * channels, height, width),
            num_actions=actions.num_actions,
            branches=actions.branches,
            stack=STACK,
            frames_per_action=1,
            field="other",
        ),
        config=replace(config, format=form, apart=apart),
    )


def _shows_pixels(space: spaces.Space[Any]) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[2] in (1, 3))
