"""Environments as batched TorchRL `EnvBase`s, N at a time, each episode with a seed of its own.

``make_environment("pong", num_envs=8, seed=0)`` gives eight Atari games; `environment_spec` tells what a network needs
to know about one, for checks before any worker starts. `mpdqn.environments.names` lists the names of all fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpdqn.environments.spec import EnvironmentSpec

if TYPE_CHECKING:
    from mpdqn.environments.atari import AtariEnvironment
    from mpdqn.environments.atari_games import FRAMES_PER_ACTION, find_game
    from mpdqn.environments.batched import BatchedEnvironment
    from mpdqn.environments.names import environment_names, environment_spec, make_environment

__all__ = [
    "FRAMES_PER_ACTION",
    "AtariEnvironment",
    "BatchedEnvironment",
    "EnvironmentSpec",
    "environment_names",
    "environment_spec",
    "find_game",
    "make_environment",
]

_HOMES = {
    "FRAMES_PER_ACTION": "atari_games",
    "AtariEnvironment": "atari",
    "BatchedEnvironment": "batched",
    "environment_names": "names",
    "environment_spec": "names",
    "find_game": "atari_games",
    "make_environment": "names",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use: a worker that runs simulators needs no torch, which would cost it 0.5 GB."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mpdqn.environments' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mpdqn.environments.{_HOMES[name]}"), name)
