"""Names of every field, what is known of each before it starts, and the errors for what cannot be played."""

from __future__ import annotations

import sys

import pytest
from ale_py import roms

from mpdqn.environments import environment_names, environment_spec, make_environment
from mpdqn.environments.atari_games import ROMS

from .toy import MODULE

STATE_ONLY = "CartPole-v1"


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (("minatar-breakout", "MinAtar/Breakout-v1", "MINATAR-Breakout-v1"), "games"),
        (("minatar-space-invaders", "MinAtar/SpaceInvaders-v1", "minatar-space_invaders"), "games"),
        (("highway", "Highway", "highway-v0"), "driving"),
        (("car-racing", "car_racing", "CarRacing-v3"), "driving"),
        (("half-cheetah", "HalfCheetah-v5"), "robot"),
    ],
)
def test_the_usual_names_of_an_environment_are_one_environment(names, field):
    assert {environment_spec(name) for name in names} == {environment_spec(names[0])}
    assert environment_spec(names[0]).name == names[0]
    assert environment_spec(names[0]).field == field


def test_every_field_lists_its_names():
    names = environment_names()
    assert list(names) == ["games", "driving", "robot"]
    assert len(names["games"]) == 108 + 5
    for field in ("driving", "robot"):
        assert {environment_spec(name).field for name in names[field]} == {field}


def test_the_games_that_are_known_without_ale_py_are_those_of_ale_py():
    assert sorted(ROMS) == sorted(roms.get_all_rom_ids())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pung", "pong"),
        ("minatar-brekout", "minatar-breakout"),
        ("highwy", "highway"),
        ("CarRacng-v3", "CarRacing-v3"),
        ("half-chetah", "half-cheetah"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name, nearest):
    for make in (environment_spec, lambda name: make_environment(name, num_envs=1, seed=0)):
        with pytest.raises(ValueError, match=f"{name}.*try '{nearest}'"):
            make(name)


def test_a_module_that_cannot_be_imported_is_named():
    with pytest.raises(ValueError, match=r"'no_such_module:Game-v0'.*no_such_module"):
        environment_spec("no_such_module:Game-v0")


@pytest.mark.parametrize(
    ("name", "packages", "extra"),
    [
        ("pong", "ale-py", "atari"),
        ("minatar-breakout", "MinAtar", "minatar"),
        ("highway", "highway-env and pygame-ce", "driving"),
        ("car-racing", "Box2D and pygame-ce", "driving"),
        ("reacher", "mujoco", "robot"),
    ],
)
def test_a_missing_extra_is_named(name, packages, extra, monkeypatch):
    """With none of the extras installed, before anything is imported."""
    for module in ("ale_py", "minatar", "highway_env", "Box2D", "pygame", "mujoco"):
        monkeypatch.setitem(sys.modules, module, None)
    expected = rf"environment '{name}' needs {packages}; pip install 'mpdqn\[{extra}\]'"
    with pytest.raises(ValueError, match=expected):
        environment_spec(name)
    with pytest.raises(ValueError, match=expected):
        make_environment(name, num_envs=1, seed=0)


def test_no_pixels_names_the_observations_and_what_to_do():
    with pytest.raises(ValueError, match=r"CartPole-v1.*observes Box\(.*AddRenderObservation"):
        environment_spec(STATE_ONLY)


@pytest.mark.parametrize("name", ["Unequal", "Endless"])
def test_actions_that_cannot_be_discretised_are_refused(name):
    with pytest.raises(ValueError, match=r"takes actions in .*ActionWrapper"):
        environment_spec(f"{MODULE}:mpdqn-tests/{name}-v0")


def test_options_out_of_range_or_without_effect():
    with pytest.raises(ValueError, match="bins is 1"):
        environment_spec("reacher", bins=1)
    with pytest.raises(ValueError, match="workers is -1"):
        make_environment("highway", num_envs=1, seed=0, workers=-1)
    with pytest.warns(UserWarning, match="bins has no effect on 'highway'"):
        environment_spec("highway", bins=5)
    with pytest.warns(UserWarning, match="workers has no effect on 'minatar-breakout'"):
        make_environment("minatar-breakout", num_envs=1, seed=0, workers=1).close()
    assert environment_spec("reacher", bins=5).num_actions == 5


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_envs is 0"):
        make_environment("minatar-breakout", num_envs=0, seed=0)
    with pytest.raises(ValueError, match="first_index -1"):
        make_environment("highway", num_envs=1, seed=0, first_index=-1)
