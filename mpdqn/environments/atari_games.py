"""Names of the Atari games, known without ale-py: a game that is not installed is refused by name, not as unknown."""

from __future__ import annotations

from mpdqn.environments.nearest import nearest

FRAMES_PER_ACTION = 4
"""Frames that one action lasts (Mnih et al. 2015)."""

# ROMs of ale-py 0.12, which a test compares with those of the installed version.
ROMS = """
    adventure air_raid alien amidar assault asterix asteroids atlantis atlantis2 backgammon bank_heist basic_math
    battle_zone beam_rider berzerk blackjack bowling boxing breakout carnival casino centipede chopper_command
    combat crazy_climber crossbow darkchambers defender demon_attack donkey_kong double_dunk earthworld
    elevator_action enduro entombed et fishing_derby flag_capture freeway frogger frostbite galaxian gopher gravitar
    hangman haunted_house hero human_cannonball ice_hockey jamesbond journey_escape joust kaboom kangaroo
    keystone_kapers king_kong klax koolaid krull kung_fu_master laser_gates lost_luggage mario_bros maze_craze
    miniature_golf montezuma_revenge mr_do ms_pacman name_this_game othello pacman phoenix pitfall pitfall2 pong
    pooyan private_eye qbert riverraid road_runner robotank seaquest sir_lancelot skiing solaris space_invaders
    space_war star_gunner superman surround tennis tetris tic_tac_toe_3d time_pilot trondead turmoil tutankham
    up_n_down venture video_checkers video_chess video_cube video_pinball warlords wizard_of_wor word_zapper
    yars_revenge zaxxon
""".split()  # noqa: SIM905  (a list would take a line for each)


def games() -> dict[str, str]:
    """Return all ROMs' names, by the same name without underscores."""
    return {game.replace("_", ""): game for game in ROMS}


def bare_name(name: str) -> str:
    """Return ``"ALE/MsPacman-v5"``, ``"MsPacman"`` and ``"ms_pacman"`` without what they differ in."""
    return name.lower().removeprefix("ale/").removesuffix("-v5").replace("_", "")


def find_game(name: str) -> str:
    """Return the ROM's name of a game: ``"ms_pacman"`` for itself, ``"MsPacman"`` and ``"ALE/MsPacman-v5"``.

    Raises:
        ValueError: for any other name; the nearest one is offered.
    """
    found, bare = games(), bare_name(name)
    if bare in found:
        return found[bare]
    near = found[nearest(bare, found)]
    raise ValueError(f"there is no environment {name!r} among the {len(found)} Atari games; try {near!r}")
