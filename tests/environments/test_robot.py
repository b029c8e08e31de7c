"""Robot control on MuJoCo: drawn pixels, bang-off-bang branches, and the same in any division and in workers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AddRenderObservation

from mpdqn.environments import environment_spec, make_environment, robot
from mpdqn.environments.own import find_registered, own_kind
from mpdqn.environments.simulator import Simulator, make
from mpdqn.environments.workers import Workers
from mpdqn.randomness import keyed_seed

from .playing import assert_stacks, play, some_actions

pytest.importorskip("mujoco", reason="the extra robot is not installed")
try:
    robot.find_renderer()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_what_is_known_of_every_task_is_what_its_simulator_says():
    for name, kind in robot.tasks().items():
        environment = make(kind.config)
        space = environment.action_space
        assert space.shape == (kind.spec.branches,), name
        assert space.is_bounded(), name
        environment.close()


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
    own.reset(seed=keyed_seed("environment", 7, 0, 0) % 2**31)
    current = environment.reset()
    current["action"] = torch.tensor([[0, 2]])
    reward = environment.step(current)["next", "reward"].item()
    action = np.array([-1.0, 1.0], np.float32)
    expected = sum(float(own.step(action)[1]) for _ in range(2))
    assert reward == pytest.approx(expected, rel=1e-6)
    own.close()
    environment.close()


def test_an_episode_is_the_same_alone_in_a_fleet_and_in_workers():
    fleet = make_environment("hopper", num_envs=2, seed=7)
    assert isinstance(fleet._crew, Workers)
    assert len(fleet._crew.pids) == 1
    whole = play(fleet, some_actions(fleet, 30))
    assert whole["next", "terminated"].any()
    alone = make_environment("hopper", num_envs=1, seed=7, first_index=1)
    assert (play(alone, some_actions(alone, 30)) == whole[:, 1:]).all()
    workers = make_environment("hopper", num_envs=2, seed=7, workers=2)
    assert len(workers._crew.pids) == 2
    assert (play(workers, some_actions(workers, 30)) == whole).all()
    for environment in (fleet, alone, workers):
        environment.close()


def test_nothing_is_smoothed_or_shadowed():
    environment = make(robot.tasks()["hopper"].config)
    quality = environment.unwrapped.model.vis.quality
    assert (quality.shadowsize, quality.offsamples) == (0, 0)
    environment.close()


def test_batches_come_and_go_and_threads_change_and_the_pictures_stay():
    """Played on by another thread than the one that began it, while another batch is made, played and closed."""
    undisturbed = make_environment("hopper", num_envs=2, seed=7)
    actions = some_actions(undisturbed, 12)
    expected = play(undisturbed, actions)
    undisturbed.close()
    environment, other = make_environment("hopper", num_envs=2, seed=7), make_environment("reacher", num_envs=1, seed=7)
    environment.reset()
    play(other, some_actions(other, 2))
    other.close()
    with ThreadPoolExecutor(1) as thread:
        assert (thread.submit(play, environment, actions).result() == expected).all()
    environment.close()


def drawn(simulator: Simulator, steps: int) -> list[np.ndarray]:
    return [simulator.begin(3), *(simulator.step(np.zeros(simulator.actions.branches, int))[0] for _ in range(steps))]


def test_simulators_of_one_thread_draw_each_in_its_own_context():
    """Of different models, one after the other, and after one of them is closed."""
    tasks = robot.tasks()
    expected = {}
    for name in ("hopper", "reacher"):
        alone = Simulator(tasks[name].config)
        expected[name] = drawn(alone, 4)
        alone.close()
    hopper, reacher = Simulator(tasks["hopper"].config), Simulator(tasks["reacher"].config)
    assert np.array_equal(drawn(hopper, 4), expected["hopper"])
    assert np.array_equal(drawn(reacher, 4), expected["reacher"])
    assert np.array_equal(drawn(hopper, 4), expected["hopper"])
    reacher.close()
    assert np.array_equal(drawn(hopper, 4), expected["hopper"])
    hopper.close()


def test_a_black_first_picture_is_an_error(monkeypatch):
    simulator = Simulator(robot.tasks()["reacher"].config)
    monkeypatch.setattr(
        simulator.environment.unwrapped.mujoco_renderer, "render", lambda *_: np.zeros((84, 84, 3), "u1")
    )
    with pytest.raises(RuntimeError, match="first picture of environment 'reacher' is black"):
        simulator.begin(3)
    simulator.close()


def test_another_thread_than_that_of_the_first_picture_is_an_error_and_not_black():
    """If it draws at all: without a worker, a context may be refused to a second thread."""
    simulator = Simulator(robot.tasks()["reacher"].config)
    simulator.begin(3)
    with ThreadPoolExecutor(1) as thread:
        try:
            frame = thread.submit(simulator.step, np.zeros(2, int)).result()[0]
        except Exception:
            frame = None
    assert frame is None or frame.any()
    simulator.close()


def test_ones_own_environment_that_mujoco_draws_has_a_worker(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", robot.find_renderer())

    def reach():
        return AddRenderObservation(gymnasium.make("Reacher-v5", render_mode="rgb_array", width=40, height=40))

    gymnasium.register("mpdqn-tests/Reach-v0", entry_point=reach)
    assert own_kind("mpdqn-tests/Reach-v0", find_registered("mpdqn-tests/Reach-v0")).config.apart
    environment = make_environment("mpdqn-tests/Reach-v0", num_envs=2, seed=7)
    assert isinstance(environment._crew, Workers)
    assert environment.reset()["observation"][:, -1].flatten(1).any(1).all()
    environment.close()


def test_no_log_is_left_in_the_current_folder(tmp_path, monkeypatch):
    """Gymnasium's model of the hopper makes MuJoCo warn."""
    monkeypatch.chdir(tmp_path)
    make_environment("hopper", num_envs=1, seed=7).close()
    make(robot.tasks()["hopper"].config).close()
    assert os.listdir(tmp_path) == []
