"""Driving on its real simulators: pictures, actions, limits, and the same in any division and in workers."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import pytest
import torch

from mpdqn.environments import driving, environment_spec, make_environment
from mpdqn.environments.simulator import Simulator, make, quiet

from .playing import assert_stacks, play, some_actions

pytest.importorskip("Box2D", reason="the extra driving is not installed")
QUICK = "highway-fast"


@pytest.mark.parametrize("name", list(driving.scenes()))
def test_what_is_known_of_every_scene_is_what_its_simulator_says(name):
    kind = driving.scenes()[name]
    environment = make(kind.config)
    assert isinstance(environment.action_space, gymnasium.spaces.Discrete)
    assert environment.action_space.n == kind.spec.num_actions
    shape = environment.observation_space.shape
    if name == "car-racing":
        assert shape == (96, 96, 3)
    else:
        # Before it is stood upright, and square, so that every published network fits.
        assert shape == (1, 84, 84)
    assert kind.config.format.frame_shape((96, 96, 3)[: 3 if name == "car-racing" else 2])[1:] in ((84, 84), (96, 96))
    environment.close()


@pytest.mark.parametrize("name", [QUICK, "car-racing"])
def test_an_episode_is_the_same_alone_in_a_fleet_and_in_workers(name):
    """Across an end of an episode, in simulators that played others before, and in a worker that was killed."""
    steps = 12
    fleet = make_environment(name, num_envs=2, seed=7)
    whole = play(fleet, some_actions(fleet, steps))
    current = fleet.reset()  # episode 1, from wherever episode 0 was
    assert set(current["episode"].tolist()) <= {1, 2}
    workers = make_environment(name, num_envs=2, seed=7, workers=2)
    actions = some_actions(workers, steps)
    current, played = workers.reset(), []
    for t, action in enumerate(actions):
        if t == 6:
            os.kill(workers._crew.pids[1], signal.SIGKILL)
        current["action"] = action
        transition, current = workers.step_and_maybe_reset(current)
        played.append(transition.clone())
    assert (torch.stack(played) == whole).all()
    assert workers.num_restarts == 1
    alone = make_environment(name, num_envs=1, seed=7, first_index=1)
    again = play(alone, some_actions(alone, steps))
    assert (again == whole[:, 1:]).all()
    assert not torch.equal(whole["observation"][:, 0], whole["observation"][:, 1])
    assert_stacks(fleet, whole)
    for environment in (fleet, workers, alone):
        environment.close()


def test_an_episode_does_not_depend_on_the_ones_before_it():
    """The second episode of a simulator that played a first is what a new simulator plays."""
    for name in (QUICK, "car-racing"):
        kind = driving.scenes()[name]
        used, new = Simulator(kind.config), Simulator(kind.config)
        used.begin(1)
        for action in (0, 1, 2, 1):
            used.step(action)
        assert (used.begin(5) == new.begin(5)).all()
        for action in (1, 1, 2, 0, 2):
            (frame, *rest), (same, *equal) = used.step(action), new.step(action)
            assert (frame == same).all()
            assert rest == equal
        used.close()
        new.close()


def played(name: str) -> list[float]:
    simulator = Simulator(driving.scenes()[name].config)
    trace = [float(simulator.begin(1).sum())]
    for action in (1, 0, 2, 1):
        frame, reward, *_ = simulator.step(action)
        trace += [float(frame.sum()), reward]
    simulator.close()
    return trace


def test_scenes_of_one_process_leave_one_another_alone(monkeypatch):
    """The intersection sets how all vehicles of a class drive, in any scene of the process."""
    behavior = pytest.importorskip("highway_env.vehicle.behavior")
    manners = driving._manners()
    before = played(QUICK)
    assert played("intersection") == played("intersection")
    assert played(QUICK) == before
    assert driving._manners() == manners
    assert manners[behavior.IDMVehicle, "DISTANCE_WANTED"] == 5.0 + behavior.IDMVehicle.LENGTH
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # highway-env would draw black pictures
    assert played(QUICK) == before


def test_scenes_in_several_threads_leave_one_another_alone():
    """As acting and evaluation may: making, playing and closing overlap."""
    names = (QUICK, "intersection", "car-racing") * 2
    pytest.importorskip("highway_env")
    manners = driving._manners()
    expected, stdout = [played(name) for name in names], sys.stdout
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(played, names)) == expected
    assert driving._manners() == manners
    assert sys.stdout is stdout
    assert "SDL_VIDEODRIVER" not in os.environ


def test_races_in_several_threads_leave_one_another_alone():
    """pygame fills polygons with memory that all threads share: pictures came out with parts of another's road."""
    expected = played("car-racing")
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(played, ["car-racing"] * 6)) == [expected] * 6


def test_one_thread_at_a_time_is_quiet():
    def whisper() -> bool:
        with quiet({}):
            return True

    with ThreadPoolExecutor(1) as thread:
        with quiet({}):
            second = thread.submit(whisper)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
        assert second.result(timeout=60)


def test_traffic_is_upright_and_drives_to_the_right():
    """The road lies across the picture: rows differ, and the picture is not the simulator's own, on its side."""
    environment = make_environment("highway", num_envs=1, seed=0)
    picture = environment.reset()["observation"][0, -1].float()
    assert picture.mean(1).std() > 2 * picture.mean(0).std()
    environment.close()


def test_car_racing_keeps_the_pixels_above_the_dashboard():
    kind = driving.scenes()["car-racing"]
    assert kind.config.format.frame_shape((96, 96, 3)) == (1, 84, 84) == (1, *kind.spec.observation_shape[1:])
    assert environment_spec("car-racing").frames_per_action == 4


def test_a_crash_terminates_and_time_truncates():
    environment = make_environment(QUICK, num_envs=2, seed=3)
    actions = torch.tensor([[3, 4]]).expand(31, 2)  # faster, and slower
    steps = play(environment, actions)
    after = steps["next"]
    assert after["terminated"][:, 0].any()
    assert not (after["terminated"] & after["truncated"]).any()
    first_end = int(after["done"][:, 1].squeeze(-1).nonzero()[0]) if after["done"][:, 1].any() else 31
    assert first_end == 29 or after["terminated"][first_end, 1]
    environment.close()
