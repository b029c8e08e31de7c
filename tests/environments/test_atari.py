"""Real games: the protocol, the bookkeeping of episodes, and that an episode depends on its seed and actions alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from mpdqn.environments import (
    FRAMES_PER_ACTION,
    AtariEnvironment,
    EnvironmentSpec,
    atari,
    environment_spec,
    make_environment,
)
from mpdqn.randomness import keyed_seed

from .playing import play


def random_actions(steps: int, num_envs: int, num_actions: int = 6) -> torch.Tensor:
    return torch.randint(num_actions, (steps, num_envs), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def environment():
    made = AtariEnvironment("pong", num_envs=3, seed=7, num_threads=1, max_episode_frames=60)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["pong", "Pong", "ALE/Pong-v5"])
def test_the_usual_names_of_a_game_are_one_game(name):
    assert environment_spec(name) == EnvironmentSpec(name="pong", observation_shape=(4, 84, 84), num_actions=6)


def test_a_name_of_two_words_is_found():
    assert environment_spec("MsPacman").num_actions == environment_spec("ms_pacman").num_actions == 9


@pytest.mark.parametrize(
    ("name", "nearest"), [("pung", "pong"), ("ALE/Brekout-v5", "breakout"), ("MsPackman", "ms_pacman")]
)
def test_an_unknown_game_offers_the_nearest(name, nearest):
    for make in (environment_spec, lambda name: make_environment(name, num_envs=1, seed=0)):
        with pytest.raises(ValueError, match=f"{name}.*try '{nearest}'"):
            make(name)


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_envs is 0"):
        make_environment("pong", num_envs=0, seed=0)
    with pytest.raises(ValueError, match="first_index -1"):
        make_environment("pong", num_envs=1, seed=0, first_index=-1)


def test_it_is_a_correct_torchrl_environment(environment):
    check_env_specs(environment)


def test_shapes_and_dtypes(environment):
    first = environment.reset()
    assert environment.batch_size == torch.Size([3])
    assert (first["observation"].shape, first["observation"].dtype) == ((3, 4, 84, 84), torch.uint8)
    first["action"] = torch.zeros(3, dtype=torch.int64)
    after = environment.step(first)["next"]
    assert (after["reward"].shape, after["reward"].dtype) == ((3, 1), torch.float32)
    for key in ("done", "terminated", "truncated"):
        assert (after[key].shape, after[key].dtype) == ((3, 1), torch.bool)
    assert environment.observation_shape == (4, 84, 84)
    assert environment.num_actions == 6
    assert environment.frames_per_action == FRAMES_PER_ACTION == 4


def test_stacks_begin_padded_with_zeros_and_then_shift_by_one_frame(environment):
    first = environment.reset()["observation"]
    assert not first[:, :3].any()
    assert first[:, 3].flatten(1).any(1).all()
    steps = play(environment, random_actions(40, 3))
    torch.testing.assert_close(steps["next", "observation"][:, :, :3], steps["observation"][:, :, 1:], rtol=0, atol=0)
    begins = steps["step"] == 0
    assert begins.sum() == 3 * 3
    assert not steps["observation"][begins][:, :3].any()


def test_the_frame_limit_truncates_and_no_step_is_a_phantom(environment):
    steps = play(environment, random_actions(40, 3))
    # 60 frames are 15 actions: done at t = 14 and 29, and the step after is an ordinary first step of a next episode.
    expected = torch.zeros(40, 3, 1, dtype=torch.bool)
    expected[[14, 29]] = True
    assert torch.equal(steps["next", "truncated"], expected)
    assert torch.equal(steps["next", "done"], expected)
    assert not steps["next", "terminated"].any()
    assert torch.equal(steps["step"][:, 0], torch.arange(40) % 15)
    assert torch.equal(steps["episode"][:, 0], torch.arange(40) // 15)


def test_a_lost_game_of_pong_is_terminated_with_its_true_return():
    environment = make_environment("pong", num_envs=1, seed=0, num_threads=1)
    current, total, steps = environment.reset(), 0.0, 0
    while not current["done"].any():
        current["action"] = torch.zeros(1, dtype=torch.int64)
        current = environment.step(current)["next"]
        total, steps = total + current["reward"].item(), steps + 1
    assert current["terminated"].all()
    assert not current["truncated"].any()
    assert total == -21.0
    with pytest.raises(RuntimeError, match=r"environments \[0\] are over"):
        environment.step(current.set("action", torch.zeros(1, dtype=torch.int64)))
    environment.close()


def test_a_lost_life_ends_nothing_and_rewards_are_not_clipped():
    environment = make_environment("ms_pacman", num_envs=1, seed=3, num_threads=1)
    steps = play(environment, random_actions(150, 1, num_actions=9))
    assert not steps["next", "done"].any()  # the first of three lives is lost well before step 150
    assert steps["next", "reward"].max() >= 10
    environment.close()


def test_an_episode_is_a_function_of_seed_index_and_actions():
    """Environment 2 in a fleet of three and alone plays the same frames, across several ends of episodes."""
    actions = random_actions(50, 3)
    fleet = AtariEnvironment("pong", num_envs=3, seed=7, max_episode_frames=80, num_threads=2)
    alone = AtariEnvironment("pong", num_envs=1, seed=7, first_index=2, max_episode_frames=80, num_threads=1)
    a, b = play(fleet, actions)[:, 2:], play(alone, actions[:, 2:])
    assert (a == b).all()
    fleet.close()
    alone.close()


def test_sticky_actions_make_seeds_matter():
    """Without no-op starts the sticky actions are the only randomness there is, so they must be on."""
    actions = random_actions(60, 1).expand(60, 2)
    environment = make_environment("pong", num_envs=2, seed=7, num_threads=1)
    steps = play(environment, actions)
    assert torch.equal(steps["observation"][0, 0], steps["observation"][0, 1])
    assert not torch.equal(steps["observation"][:, 0], steps["observation"][:, 1])
    environment.set_seed(8)
    assert not torch.equal(play(environment, actions)["observation"], steps["observation"])
    environment.set_seed(7)
    assert torch.equal(play(environment, actions)["observation"], steps["observation"])
    environment.close()


def test_reset_twice_is_reset_once_and_a_reset_in_between_begins_the_next_episode(environment):
    first = environment.reset()
    again = environment.reset()
    assert (first == again).all()
    assert not again["episode"].any()
    again["action"] = torch.zeros(3, dtype=torch.int64)
    current = environment.step(again)["next"]
    current["_reset"] = torch.tensor([[False], [True], [False]])
    after = environment.reset(current)
    assert after["episode"].tolist() == [0, 1, 0]
    assert after["step"].tolist() == [1, 0, 1]


def test_set_seed_wants_a_number(environment):
    with pytest.raises(ValueError, match="not None"):
        environment.set_seed(None)


@pytest.mark.parametrize("reserve_after", [3, 1000])
def test_the_next_episode_loaded_beside_the_running_one_is_the_same(reserve_after, monkeypatch):
    """From a game of ale-py's own that is reset with the episodes' seeds, whether a reserve steps in or not."""
    monkeypatch.setattr(atari, "RESERVE_AFTER", reserve_after)
    environment = AtariEnvironment("pong", num_envs=2, seed=7, num_threads=1, max_episode_frames=40)
    actions = random_actions(25, 2)
    steps = play(environment, actions)
    assert bool(environment._reserves) == (reserve_after == 3)
    plain = atari._vector_env("pong", 40)
    for e in range(2):
        for t in range(25):
            if t % 10 == 0:
                seed = keyed_seed("environment", 7, e, t // 10) % 2**31
                observation = plain.reset(seed=np.array([seed]))[0]
            assert np.array_equal(steps["observation"][t, e], observation[0])
            observation = plain.step(actions[t, e : e + 1].numpy())[0]
            assert np.array_equal(steps["next", "observation"][t, e], observation[0])
    environment.set_seed(8)  # what was loaded for seed 7 is not played
    other = AtariEnvironment("pong", num_envs=2, seed=8, num_threads=1, max_episode_frames=40)
    assert (play(environment, actions) == play(other, actions)).all()
    environment.close()
    other.close()
