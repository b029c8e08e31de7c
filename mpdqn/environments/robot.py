"""Robot control: Gymnasium's MuJoCo tasks seen as pixels, each joint a branch of bang-off-bang actions.

The pictures are those of DrQ-v2 (Yarats et al. 2021, "Mastering visual continuous control"): 84 × 84, colour, stacks of
3, an action taken twice. They are drawn off screen with EGL or OSMesa, without shadows and smoothing: on a CPU these
cost ten times what the picture itself does (Hopper: 75 ms with, 6 ms without). They are always drawn in a worker
process, in which one thread draws and nothing is closed before the end, see `mpdqn.environments.contexts`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mpdqn.environments.discretize import BINS
from mpdqn.environments.pixels import PixelFormat
from mpdqn.environments.simulator import SimulatedKind, SimulatorConfig
from mpdqn.environments.spec import EnvironmentSpec

STACK = 3
SIZE = 84
FRAMES_PER_ACTION = 2
_TASKS = {  # short name: Gymnasium's id, dimensions of the action
    "reacher": ("Reacher-v5", 2),
    "pusher": ("Pusher-v5", 7),
    "inverted-pendulum": ("InvertedPendulum-v5", 1),
    "inverted-double-pendulum": ("InvertedDoublePendulum-v5", 1),
    "half-cheetah": ("HalfCheetah-v5", 6),
    "hopper": ("Hopper-v5", 3),
    "swimmer": ("Swimmer-v5", 2),
    "walker2d": ("Walker2d-v5", 6),
    "ant": ("Ant-v5", 8),
    "humanoid": ("Humanoid-v5", 17),
    "humanoid-standup": ("HumanoidStandup-v5", 17),
}
_LIBRARIES = {"egl": ("libEGL.so.1", "libEGL.so"), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}


def tasks() -> dict[str, SimulatedKind]:
    """All named tasks by their short names."""
    return {name: _task(name, gymnasium_id, branches) for name, (gymnasium_id, branches) in _TASKS.items()}


def find_renderer() -> str:
    """The way to draw without a screen, as ``MUJOCO_GL`` calls it: the variable's own value, or what is installed.

    Raises:
        ValueError: if there is none; it says what to install.
    """
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    for renderer, libraries in _LIBRARIES.items():
        if any(_loads(library) for library in libraries):
            return renderer
    raise ValueError(
        "robot environments draw without a screen through EGL or OSMesa, and neither is installed here: "
        "apt-get install libegl1 libgl1-mesa-dri (or libosmesa6)"
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _renderer() -> Mapping[str, str]:
    return {"MUJOCO_GL": find_renderer()}


@contextlib.contextmanager
def no_log_file() -> Iterator[None]:
    """Have MuJoCo's warnings go to stderr from now on, and not to ``MUJOCO_LOG.TXT`` in whatever folder this is."""
    import mujoco

    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_tell)
    yield


def _tell(warning: str) -> None:
    if "'settotalmass' is deprecated" not in warning:  # of Gymnasium's own models, at each start
        print(f"MuJoCo: {warning}", file=sys.stderr)


def plain(environment: Any) -> Any:
    """The environment drawn without shadows and smoothing, from its first picture on."""
    quality = environment.unwrapped.model.vis.quality
    quality.shadowsize = quality.offsamples = 0
    return environment


def _task(name: str, gymnasium_id: str, branches: int) -> SimulatedKind:
    return SimulatedKind(
        extra="robot",
        modules=("mujoco", "imageio"),
        spec=EnvironmentSpec(
            name=name,
            observation_shape=(3 * STACK, SIZE, SIZE),
            num_actions=BINS,
            branches=branches,
            stack=STACK,
            frames_per_action=FRAMES_PER_ACTION,
            field="robot",
        ),
        config=SimulatorConfig(
            name=name,
            make=gymnasium_id,
            arguments={"render_mode": "rgb_array", "width": SIZE, "height": SIZE},
            guard=no_log_file,
            adapt=plain,
            pictures="rendered",
            format=PixelFormat(grey=False, size=None),
            frames_per_action=FRAMES_PER_ACTION,
            variables=_renderer,
            apart=True,
        ),
    )
