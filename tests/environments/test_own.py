"""One's own Gymnasium environments: pixels, actions, episodes, and the same in any division of the fleet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image
from torchrl.envs.utils import check_env_specs

from mpdqn.environments import environment_spec, make_environment
from mpdqn.environments.discretize import ActionCode
from mpdqn.environments.pixels import PixelFormat

from .playing import assert_stacks, play, some_actions
from .toy import MODULE

DRIFT = f"{MODULE}:mpdqn-tests/Drift-v0"


@pytest.fixture
def environment():
    made = make_environment(DRIFT, num_envs=3, seed=7)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "shape", "num_actions", "branches"),
    [
        ("Drift", (4, 20, 30), 3, 0),
        ("Flat", (4, 20, 30), 3, 0),
        ("Large", (4, 84, 84), 3, 0),
        ("Box", (4, 20, 30), 3, 2),
        ("Multi", (4, 20, 30), 3, 2),
    ],
)
def test_what_is_known_of_it_is_what_it_does(name, shape, num_actions, branches):
    name = f"{MODULE}:mpdqn-tests/{name}-v0"
    spec = environment_spec(name)
    assert (spec.observation_shape, spec.num_actions, spec.branches) == (shape, num_actions, branches)
    assert (spec.stack, spec.frames_per_action, spec.field) == (4, 1, "other")
    environment = make_environment(name, num_envs=2, seed=0)
    assert environment.spec == spec
    check_env_specs(environment)
    first = environment.reset()
    assert first["observation"].shape == (2, *shape)
    first["action"] = torch.zeros(2, *spec.action_shape, dtype=torch.int64)
    after = environment.step(first)["next"]
    assert (after["reward"].shape, after["reward"].dtype) == ((2, 1), torch.float32)
    for key in ("done", "terminated", "truncated"):
        assert (after[key].shape, after[key].dtype) == ((2, 1), torch.bool)
    environment.close()


def test_stacks_begin_padded_with_zeros_and_then_shift_by_one_frame(environment):
    assert_stacks(environment, play(environment, some_actions(environment, 40)))


def test_its_end_is_terminated_and_its_limit_is_truncated(environment):
    steps = play(environment, some_actions(environment, 150))
    after, last = steps["next"], steps["step"] == 11
    assert after["terminated"].any()
    assert after["truncated"].any()
    assert not (after["terminated"] & after["truncated"]).any()
    assert torch.equal(after["done"], after["terminated"] | after["truncated"])
    assert torch.equal(last, after["truncated"].squeeze(-1) | (last & after["terminated"].squeeze(-1)))
    begins = steps["step"] == 0
    assert torch.equal(begins[1:], after["done"].squeeze(-1)[:-1])
    assert torch.equal(steps["episode"], begins.cumsum(0) - 1)


def test_each_episode_has_a_seed_of_its_own(environment):
    """Same actions everywhere: environments differ, and so do episodes of one environment."""
    steps = play(environment, torch.ones(60, 3, dtype=torch.int64))
    first = [steps["next", "reward"][:8, e].flatten().tolist() for e in range(3)]
    assert len({tuple(rewards) for rewards in first}) == 3
    begins = torch.nonzero(steps["step"][:, 0] == 0).flatten()[:3].tolist()
    assert len({tuple(steps["next", "reward"][t : t + 8, 0].flatten().tolist()) for t in begins}) == 3
    again = play_seeded(environment, 7)
    assert torch.equal(again["next", "reward"], steps["next", "reward"])
    assert not torch.equal(play_seeded(environment, 8)["next", "reward"], steps["next", "reward"])


def play_seeded(environment, seed):
    environment.set_seed(seed)
    return play(environment, torch.ones(60, 3, dtype=torch.int64))


def test_an_episode_is_the_same_alone_and_in_a_fleet(environment):
    alone = make_environment(DRIFT, num_envs=1, seed=7, first_index=2)
    whole = play(environment, some_actions(environment, 50))
    assert (whole[:, 2:] == play(alone, some_actions(alone, 50))).all()
    alone.close()


def test_a_reset_in_between_begins_the_next_episode_where_it_is_asked(environment):
    first = environment.reset()
    assert (environment.reset() == first).all()
    first["action"] = torch.ones(3, dtype=torch.int64)
    current = environment.step(first)["next"]
    current["_reset"] = torch.tensor([[False], [True], [False]])
    after = environment.reset(current)
    assert after["episode"].tolist() == [0, 1, 0]
    assert after["step"].tolist() == [1, 0, 1]
    assert not after["observation"][1, :3].any()
    assert after["observation"][0, 2].any()


def test_what_was_given_out_never_changes(environment):
    first = environment.reset()
    kept = first.clone()
    first["action"] = torch.ones(3, dtype=torch.int64)
    environment.step(first)
    assert (first.select(*kept.keys()) == kept).all()


def test_over_and_out_of_range_are_refused(environment):
    with pytest.raises(RuntimeError, match=r"environments \[0, 1, 2\] are over"):
        environment._step(environment.fake_tensordict())
    current = environment.reset()
    current["action"] = torch.full((3,), 3)
    with pytest.raises(ValueError, match="actions are 0 to 2"):
        environment._step(current)


def test_pictures_are_cropped_grey_and_averaged_over_areas():
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[:2, 2:4] = 200
    frame = PixelFormat(grey=True, size=(2, 2), crop=(0, 4, 2, 6)).frame(picture)
    assert frame.tolist() == [[[200, 0], [0, 0]]]
    picture[0, 2] = 0
    assert PixelFormat(grey=True, size=(2, 2), crop=(0, 4, 2, 6)).frame(picture)[0, 0, 0] == 150
    colour = PixelFormat(grey=False, size=None).frame(picture)
    assert colour.shape == (3, 4, 6)
    assert np.array_equal(colour.transpose(1, 2, 0), picture)
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 255
    assert PixelFormat(size=None).frame(red)[0, 0, 0] == np.array(Image.fromarray(red).convert("L"))[0, 0] == 76


def test_continuous_actions_are_evenly_spaced_with_both_ends():
    code = ActionCode(spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 8.0]), dtype=np.float64), bins=3, name="x")
    assert (code.num_actions, code.branches) == (3, 2)
    assert code.decode(np.array([0, 2])).tolist() == [-1.0, 8.0]
    assert code.decode(np.array([1, 1])).tolist() == [0.0, 4.0]
    narrow = ActionCode(spaces.Box(-0.4, 0.4, (1,), np.float32), bins=7, name="x")
    assert narrow.decode(np.array([6])) == np.float32(0.4)
    assert narrow.decode(np.array([0])).dtype == np.float32


def test_discrete_actions_begin_where_the_space_does():
    assert ActionCode(spaces.Discrete(3, start=-1), name="x").decode(0) == -1
    code = ActionCode(spaces.MultiDiscrete([3, 3], start=[1, 2]), name="x")
    assert code.decode(np.array([0, 1])).tolist() == [1, 3]
