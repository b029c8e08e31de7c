"""MinAtar: what mpdqn plays is what MinAtar's own environment plays, with seeds for each episode and a limit."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from mpdqn.environments import environment_spec, make_environment
from mpdqn.environments.minatar import GAMES, MinAtarEnvironment, find_minatar
from mpdqn.randomness import keyed_seed

from .playing import assert_stacks, play, some_actions

pytest.importorskip("minatar", reason="the extra minatar is not installed")


@pytest.fixture(scope="module")
def published():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of seaborn and its like, which only the published wrapper needs
        import minatar
    return minatar.Environment


@pytest.mark.parametrize("game", GAMES.values(), ids=lambda game: game.module)
def test_every_game_is_the_published_one(game, published):
    """Frames, rewards and ends, over several episodes; the seed and the sticky actions too."""
    assert list(game.actions) == published(game.module).minimal_action_set()
    environment = MinAtarEnvironment(game, num_envs=2, seed=7, first_index=1)
    check_env_specs(environment)
    environment.set_seed(7)
    steps = play(environment, actions := some_actions(environment, 400))
    assert_stacks(environment, steps)
    own = published(game.module)
    for t in range(400):
        if steps["step"][t, 1] == 0:
            own.seed(keyed_seed("environment", 7, 2, int(steps["episode"][t, 1])) % 2**31)
            own.reset()
            own.last_action = 0
        before = torch.from_numpy(own.state().transpose(2, 0, 1).astype(np.uint8) * 255)
        assert torch.equal(steps["observation"][t, 1], before)
        reward, terminated = own.act(game.actions[int(actions[t, 1])])
        assert steps["next", "reward"][t, 1] == reward
        assert steps["next", "terminated"][t, 1] == bool(terminated)
    environment.close()


@pytest.mark.parametrize("game", GAMES.values(), ids=lambda game: game.module)
def test_an_episode_is_the_same_alone_and_in_a_fleet(game):
    fleet = MinAtarEnvironment(game, num_envs=3, seed=7)
    alone = MinAtarEnvironment(game, num_envs=1, seed=7, first_index=2)
    assert (play(fleet, some_actions(fleet, 300))[:, 2:] == play(alone, some_actions(alone, 300))).all()


def test_the_shape_and_actions_of_each_version():
    spec = environment_spec("minatar-breakout")
    assert (spec.observation_shape, spec.num_actions) == ((4, 10, 10), 3)
    assert (spec.stack, spec.frames_per_action, spec.branches, spec.field) == (1, 1, 0, "games")
    full = environment_spec("MinAtar/Breakout-v0")
    assert (full.num_actions, full.name) == (6, "minatar-breakout-v0")
    assert environment_spec(full.name) == full
    assert find_minatar("minatar-pong") is None


def test_the_limit_truncates():
    environment = MinAtarEnvironment(GAMES["freeway"], num_envs=2, seed=7, max_episode_steps=15)
    steps = play(environment, some_actions(environment, 40))
    expected = torch.zeros(40, 2, 1, dtype=torch.bool)
    expected[[14, 29]] = True
    assert torch.equal(steps["next", "truncated"], expected)
    assert torch.equal(steps["next", "done"], expected)


def test_episodes_and_environments_differ_and_seeds_repeat():
    environment = make_environment("minatar-asterix", num_envs=2, seed=7)
    actions = torch.zeros(200, 2, dtype=torch.int64)
    steps = play(environment, actions)
    assert not torch.equal(steps["observation"][:, 0], steps["observation"][:, 1])
    environment.set_seed(8)
    assert not torch.equal(play(environment, actions)["observation"], steps["observation"])
    environment.set_seed(7)
    assert (play(environment, actions) == steps).all()


def test_quick_runs_are_quick():
    """A tenth of what an idle machine does, so that a busy one passes."""
    environment = make_environment("minatar-breakout", num_envs=16, seed=7)
    current = environment.reset()
    actions = some_actions(environment, 300)
    start = time.perf_counter()
    for action in actions:
        current["action"] = action
        _, current = environment.step_and_maybe_reset(current)
    assert 300 * 16 / (time.perf_counter() - start) > 2_000
