"""Simulators in worker processes: the same transitions in any number of them, whatever dies, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import pytest
import torch

from mpdqn.environments import make_environment
from mpdqn.environments.workers import MAX_DEATHS

from .playing import play, some_actions
from .toy import limited

STEPS = 40


def register(name: str, **arguments) -> str:
    gymnasium.registry.pop(name, None)
    gymnasium.register(name, entry_point=limited, kwargs=arguments)
    return name


def gone(pid: int, *, within: float = 10.0) -> bool:
    """Whether the process ends in time; a zombie has ended."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def undisturbed():
    environment = make_environment(register("mpdqn-tests/Calm-v0"), num_envs=3, seed=7)
    actions = some_actions(environment, STEPS)
    yield actions, play(environment, actions)
    environment.close()


def test_workers_play_what_one_process_plays(undisturbed):
    actions, expected = undisturbed
    environment = make_environment(register("mpdqn-tests/Calm-v0"), num_envs=3, seed=7, workers=2)
    pids = environment._crew.pids
    assert len(pids) == 2
    assert (play(environment, actions) == expected).all()
    assert environment.num_restarts == 0
    environment.close()
    assert all(gone(pid) for pid in pids)


def test_a_worker_that_dies_is_replaced_and_no_transition_is_lost(undisturbed, tmp_path):
    """Killed inside a step, between steps, and before a reset: what is played is what an undisturbed run plays."""
    actions, expected = undisturbed
    deadly = tmp_path / "deadly"
    name = register("mpdqn-tests/Deadly-v0", deadly=str(deadly))
    environment = make_environment(name, num_envs=3, seed=7, workers=2)
    current, steps = environment.reset(), []
    for t, action in enumerate(actions):
        if t in (5, 21):
            deadly.touch()
        if t == 11:
            os.kill(environment._crew.pids[0], signal.SIGKILL)
        current["action"] = action
        transition, current = environment.step_and_maybe_reset(current)
        steps.append(transition.clone())
    assert (torch.stack(steps) == expected).all()
    assert environment.num_restarts == 3
    environment.close()


def test_a_step_that_always_kills_is_one_clear_error(tmp_path):
    deadly = tmp_path / "deadly"
    name = register("mpdqn-tests/Fatal-v0", deadly=str(deadly), forever=True)
    environment = make_environment(name, num_envs=1, seed=7, first_index=4, workers=1)
    current = environment.reset()
    deadly.touch()
    current["action"] = torch.ones(1, dtype=torch.int64)
    expected = rf"environments \[4\] of '{name}' died {MAX_DEATHS} times in a row.*SIGKILL.*workers=0"
    with pytest.raises(RuntimeError, match=expected):
        environment.step(current)
    environment.close()


def test_an_error_of_the_simulator_is_raised_with_its_own_words():
    name = register("mpdqn-tests/Broken-v0", fails_at=2)
    environment = make_environment(name, num_envs=1, seed=7, workers=1)
    with pytest.raises(RuntimeError, match="ArithmeticError: the toy broke"):
        play(environment, torch.ones(3, 1, dtype=torch.int64))
    assert environment.num_restarts == 0
    environment.close()


SCRIPT = """
import time
import gymnasium, numpy as np, torch

class Mine(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (10, 10), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full((10, 10), seed % 256, np.uint8), {}
    def step(self, action):
        return np.full((10, 10), action, np.uint8), 1.0, False, False, {}

gymnasium.register("Mine-v0", entry_point=Mine)
from mpdqn.environments import make_environment
environment = make_environment("Mine-v0", num_envs=2, seed=0, workers=2)
state = environment.reset()
state["action"] = torch.tensor([0, 1])
assert environment.step(state)["next", "observation"][:, -1, 0, 0].tolist() == [0, 1]
print(*environment._crew.pids, flush=True)
time.sleep(600)
"""


def test_workers_end_with_their_parent_even_when_it_is_killed():
    """From ``python -c``, with an environment that lives in the script alone."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_worker_needs_no_torch():
    """Its imports would cost each worker half a gigabyte."""
    code = "import sys, mpdqn.environments.worker; sys.exit(any(m in sys.modules for m in ('torch', 'torchrl')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
