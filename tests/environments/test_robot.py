"""Robot control on MuJoCo: drawn pixels, bang-off-bang branches, and the same in any division and in workers."""

from __future__ import annotations

import gymnasium
import pytest
import torch

from mpdqn.environments import environment_spec, make_environment, robot
from mpdqn.environments.simulator import make
from mpdqn.environments.workers import Workers

from .playing import assert_stacks, play, some_actions

pytest.importorskip("mujoco", reason="the extra robot is not installed")
try:
    robot.find_renderer()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_what_is_known_of_every_task_is_what_its_simulator_says():
    for name, kind in robot.tasks().items():
        space = gymnasium.make(kind.config.make).action_space
        assert space.shape == (kind.spec.branches,), name
        assert space.is_bounded(), name


def test_no_renderer_says_what_to_install(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(robot, "_loads", lambda library: False)
    with pytest.raises(ValueError, match="apt-get install libegl1"):
        make_environment("reacher", num_envs=1, seed=0)
    monkeypatch.setattr(robot, "_loads", lambda library: "OSMesa" in library)
    assert robot.find_renderer() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert robot.find_renderer() == "glfw"


def test_pixels_branches_and_episodes():
    environment = make_environment("reacher", num_envs=2, seed=7, bins=5)
    assert environment.spec == environment_spec("reacher", bins=5)
    assert environment.action_spec.shape == (2, 2)
    steps = play(environment, actions := some_actions(environment, 27))
    assert actions.max() == 4
    assert steps["observation"].shape == (27, 2, 9, 84, 84)
    assert_stacks(environment, steps)
    # 50 of its own steps are 25 of two each.
    assert steps["next", "truncated"].squeeze(-1).nonzero().tolist() == [[24, 0], [24, 1]]
    assert not steps["next", "terminated"].any()
    assert (steps["next", "reward"] < 0).all()
    newest = steps["observation"][:, 0, -3:]
    assert newest.float().std(dim=1).mean() > 1  # in colour
    assert all(not torch.equal(newest[t], newest[t + 1]) for t in range(24))
    environment.close()


def test_an_action_is_taken_twice_and_its_rewards_are_added():
    environment = make_environment("reacher", num_envs=1, seed=7)
    own = gymnasium.make("Reacher-v5")
    from mpdqn.randomness import keyed_seed

    own.reset(seed=keyed_seed("environment", 7, 0, 0) % 2**31)
    current = environment.reset()
    current["action"] = torch.tensor([[0, 2]])
    reward = environment.step(current)["next", "reward"].item()
    import numpy as np

    action = np.array([-1.0, 1.0], np.float32)
    expected = sum(float(own.step(action)[1]) for _ in range(2))
    assert reward == pytest.approx(expected, rel=1e-6)
    environment.close()


def test_an_episode_is_the_same_alone_in_a_fleet_and_in_workers():
    fleet = make_environment("hopper", num_envs=2, seed=7)
    whole = play(fleet, some_actions(fleet, 30))
    assert whole["next", "terminated"].any()
    alone = make_environment("hopper", num_envs=1, seed=7, first_index=1)
    assert (play(alone, some_actions(alone, 30)) == whole[:, 1:]).all()
    workers = make_environment("hopper", num_envs=2, seed=7, workers=1)
    assert isinstance(workers._crew, Workers)
    assert (play(workers, some_actions(workers, 30)) == whole).all()
    for environment in (fleet, alone, workers):
        environment.close()


def test_nothing_is_smoothed_or_shadowed():
    environment = make(robot.tasks()["hopper"].config)
    quality = environment.unwrapped.model.vis.quality
    assert (quality.shadowsize, quality.offsamples) == (0, 0)
    environment.close()
