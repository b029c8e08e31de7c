"""`EnvironmentSpec`: what networks, replay and actors must know of an environment before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """One kind of environment.

    ``observation_shape`` (C, H, W) of the uint8 observations; C is ``stack`` frames of equally many channels, the
    newest last. ``num_actions`` choices: of one discrete action if ``branches`` is 0, else of each of ``branches``
    discretised dimensions of a continuous action. ``frames_per_action`` frames of the simulator pass in a step.
    ``field`` is "games", "driving", "robot" or, for an environment of one's own, "other".
    """

    name: str
    observation_shape: tuple[int, int, int]
    num_actions: int
    branches: int = 0
    stack: int = 4
    frames_per_action: int = 4
    field: str = "games"

    @property
    def action_shape(self) -> tuple[int, ...]:
        """The shape of one environment's action: () or (branches,)."""
        return (self.branches,) if self.branches else ()
