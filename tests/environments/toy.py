"""Environments of one's own, as a user would register them: quick, seeded, and deadly if asked."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

MODULE = __name__


class Drift(gymnasium.Env):
    """A block drifts at random; it is over when the block leaves the picture, which
    never happens if it stands ``still``.

    While the file ``deadly`` exists, a step kills the process, and takes the file with it unless ``forever``.
    """

    def __init__(
        self, actions="discrete", shape=(20, 30, 3), deadly="", forever=False, fails_at=-1, width=25, still=False
    ) -> None:
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = {
            "discrete": spaces.Discrete(3, start=-1),
            "box": spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 2.0], np.float32)),
            "multi": spaces.MultiDiscrete([3, 3]),
            "unequal": spaces.MultiDiscrete([3, 2]),
            "endless": spaces.Box(-np.inf, np.inf, (2,)),
        }[actions]
        self._deadly, self._forever, self._fails_at, self._width = deadly, forever, fails_at, width
        self._still = still

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._x, self._t = 12, 0
        return self._picture(), {}

    def step(self, action):
        if self._deadly and self._is_struck(Path(self._deadly)):
            os.kill(os.getpid(), signal.SIGKILL)
        self._t += 1
        if self._t == self._fails_at:
            raise ArithmeticError("the toy broke")
        self._x += 0 if self._still else int(np.sum(action)) + int(self.np_random.integers(-2, 3))
        over = not 0 <= self._x < self._width
        return self._picture(), self._x / 10, over, False, {}

    def _is_struck(self, deadly: Path) -> bool:
        if self._forever:
            return deadly.exists()
        with contextlib.suppress(FileNotFoundError):  # of two workers, one takes it
            deadly.unlink()
            return True
        return False

    def _picture(self):
        picture = np.full(self.observation_space.shape, self._t % 200, np.uint8)
        picture[:, min(max(self._x, 0), 29)] = 255
        return picture


def limited(**arguments):
    return TimeLimit(Drift(**arguments), 12)


gymnasium.register("mpdqn-tests/Drift-v0", entry_point=limited)
gymnasium.register("mpdqn-tests/Endless-Drift-v0", entry_point=Drift, kwargs={"still": True})
gymnasium.register("mpdqn-tests/Box-v0", entry_point=limited, kwargs={"actions": "box"})
gymnasium.register("mpdqn-tests/Multi-v0", entry_point=limited, kwargs={"actions": "multi"})
gymnasium.register("mpdqn-tests/Unequal-v0", entry_point=limited, kwargs={"actions": "unequal"})
gymnasium.register("mpdqn-tests/Endless-v0", entry_point=limited, kwargs={"actions": "endless"})
gymnasium.register("mpdqn-tests/Large-v0", entry_point=limited, kwargs={"shape": (100, 120, 3)})
gymnasium.register("mpdqn-tests/Flat-v0", entry_point=limited, kwargs={"shape": (20, 30)})
