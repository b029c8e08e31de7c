"""Environments as batched TorchRL `EnvBase`s, N at a time, each episode with a seed of its own.

``make_environment("pong", num_envs=8, seed=0)`` gives eight Atari games; `environment_spec` tells what a network needs
to know about one, for checks before any worker starts. Today the names are Atari's.
"""

from __future__ import annotations

from mpdqn.environments.atari import FRAMES_PER_ACTION, STACK, AtariEnvironment, find_game, game_spec
from mpdqn.environments.spec import EnvironmentSpec

__all__ = [
    "FRAMES_PER_ACTION",
    "AtariEnvironment",
    "EnvironmentSpec",
    "environment_spec",
    "find_game",
    "make_environment",
]


def make_environment(
    name: str, *, num_envs: int, seed: int, first_index: int = 0, num_threads: int = 0
) -> AtariEnvironment:
    """The environments ``first_index`` up to ``first_index + num_envs`` of the game ``name``, as one batch.

    Args:
        name: ``"pong"``, ``"Pong"`` or ``"ALE/Pong-v5"``.
        num_envs: N, the batch size.
        seed: the run's seed; an episode's own follows from it, the environment's index and the episode's number.
        first_index: global index of the first environment, so that processes with parts of a fleet play its games.
        num_threads: threads that step the games; 0 is one for each core, at most N.

    Raises:
        ValueError: for a name that is no game (the nearest one is offered) or counts out of range.
    """
    return AtariEnvironment(
        find_game(name), num_envs=num_envs, seed=seed, first_index=first_index, num_threads=num_threads
    )


def environment_spec(name: str) -> EnvironmentSpec:
    """Observation shape and number of actions of the game ``name``, in about 0.1 s (its ROM is loaded once).

    Raises:
        ValueError: for a name that is no game; the nearest one is offered.
    """
    game = find_game(name)
    shape, num_actions = game_spec(game)
    return EnvironmentSpec(
        name=game, observation_shape=shape, num_actions=num_actions, stack=STACK, frames_per_action=FRAMES_PER_ACTION
    )
