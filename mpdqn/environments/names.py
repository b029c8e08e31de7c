"""The names of all environments, and how each is found and made.

    "pong"  "ALE/Pong-v5"                     Atari games, `mpdqn.environments.atari` and `atari_games`
    "minatar-breakout"  "MinAtar/Breakout-v1" small games, `mpdqn.environments.minatar`
    "highway"  "car-racing"  "CarRacing-v3"   driving, `mpdqn.environments.driving`
    "reacher"  "HalfCheetah-v5"               robot control, `mpdqn.environments.robot`
    "MyGame-v0"  "my_module:MyGame-v0"        any other Gymnasium id, `mpdqn.environments.own`

A Gymnasium id of an environment that has a short name means the named configuration, with its pixels.
"""

from __future__ import annotations

import warnings

import gymnasium

from mpdqn.environments import driving, robot
from mpdqn.environments.atari_games import bare_name, find_game, games
from mpdqn.environments.batched import BatchedEnvironment
from mpdqn.environments.discretize import BINS
from mpdqn.environments.minatar import GAMES, MinAtarEnvironment, MinAtarGame, find_minatar
from mpdqn.environments.nearest import nearest
from mpdqn.environments.own import find_registered, own_kind
from mpdqn.environments.simulated import SimulatedEnvironment
from mpdqn.environments.simulator import SimulatedKind
from mpdqn.environments.spec import EnvironmentSpec
from mpdqn.extras import require_extra


def environment_names() -> dict[str, list[str]]:
    """The short names of each field; one's own environments, and the fields' Gymnasium ids, come on top."""
    return {
        "games": sorted(games().values()) + [game.name for game in GAMES.values()],
        "driving": list(driving.scenes()),
        "robot": list(robot.tasks()),
    }


def make_environment(
    name: str,
    *,
    num_envs: int,
    seed: int,
    first_index: int = 0,
    num_threads: int = 0,
    workers: int = 0,
    bins: int | None = None,
) -> BatchedEnvironment:
    """The environments ``first_index`` up to ``first_index + num_envs`` of the kind ``name``, as one batch.

    Args:
        name: see the top of this file.
        num_envs: N, the batch size.
        seed: the run's seed; an episode's own follows from it, the environment's index and the episode's number.
        first_index: global index of the first environment, so that processes with parts of a fleet play its games.
        num_threads: Atari games that are stepped at a time; 0 leaves it to the cores. Other fields have no threads.
        workers: processes in which simulators written in Python (driving, robot, one's own) run; 0 for this process,
            but for what MuJoCo draws, which has one at least. What they play is the same in any number of them.
        bins: values of each dimension of a continuous action; None for 3.

    Raises:
        ValueError: for an unknown name (the nearest one is offered), a missing extra (it is named), an environment that
            shows no pixels or cannot be discretised, or counts out of range.
    """
    kind = _find(name, bins)
    if workers < 0:
        raise ValueError(f"workers is {workers} but must be at least 0")
    if isinstance(kind, SimulatedKind):
        return SimulatedEnvironment(kind, num_envs=num_envs, seed=seed, first_index=first_index, workers=workers)
    if workers:
        warnings.warn(f"workers has no effect on {name!r}, which is quick enough in one process", stacklevel=2)
    if isinstance(kind, MinAtarGame):
        return MinAtarEnvironment(kind, num_envs=num_envs, seed=seed, first_index=first_index)
    from mpdqn.environments.atari import AtariEnvironment  # here, as ale-py is an extra

    return AtariEnvironment(kind, num_envs=num_envs, seed=seed, first_index=first_index, num_threads=num_threads)


def environment_spec(name: str, *, bins: int | None = None) -> EnvironmentSpec:
    """What there is to know of the kind ``name``, at once, in 0.1 s for Atari or by making one's own environment once.

    Raises:
        ValueError: as `make_environment` does for ``name`` and ``bins``.
    """
    kind = _find(name, bins)
    if isinstance(kind, SimulatedKind):
        return kind.spec
    if isinstance(kind, MinAtarGame):
        return kind.spec()
    from mpdqn.environments.atari import game_spec

    return game_spec(kind)


def _find(name: str, bins: int | None) -> str | MinAtarGame | SimulatedKind:
    """The kind of ``name``: an Atari ROM's name, a game of MinAtar, or something that Python simulates."""
    if bins is not None and bins < 2:
        raise ValueError(f"bins is {bins} but a continuous action needs at least 2 values")
    if game := find_minatar(name):
        require_extra("minatar", f"environment {game.name!r}")
        return game
    if name.lower().startswith("ale/") or bare_name(name) in games():
        rom = find_game(name)
        require_extra("atari", f"environment {rom!r}")
        return rom
    simulated = driving.scenes() | robot.tasks()
    by_id = {str(kind.config.make): kind for kind in simulated.values()}
    kind = simulated.get(name.lower().replace("_", "-")) or by_id.get(name)
    if kind is not None:
        require_extra(kind.extra, f"environment {kind.spec.name!r}", kind.modules)
        if bins is not None and kind.spec.branches:
            kind = kind.with_bins(bins)
    elif registered := find_registered(name):
        kind = own_kind(name, registered, bins=bins or BINS)
    else:
        known = {short.replace("_", ""): short for names in environment_names().values() for short in names}
        known |= {identity.lower(): identity for identity in (*by_id, *gymnasium.registry)}
        near = known[nearest(name.lower().replace("_", ""), known)]
        raise ValueError(f"there is no environment {name!r}; try {near!r}")
    if bins is not None and not kind.spec.branches:
        warnings.warn(f"bins has no effect on {name!r}, whose actions are discrete", stacklevel=3)
    return kind
