"""Optional extras: the packages that each one brings, found without importing them, and what to install for them.

The core does without all of them (docs/licences.md). A feature that cannot work without its extra is refused before any
work starts: `require_extra`. Where only a nicety is missing, such as a plot, the work goes on and one line says what is
not written: `missing_packages`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "atari": {"ale_py": "ale-py"},
    "minatar": {"minatar": "MinAtar"},
    "driving": {"highway_env": "highway-env", "Box2D": "Box2D", "pygame": "pygame-ce"},
    "robot": {"mujoco": "mujoco", "imageio": "imageio"},
    "plot": {"matplotlib": "matplotlib"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "video": {"imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg"},
    "wandb": {"wandb": "wandb"},
}
"""The extras of pyproject.toml: the packages of each by the name under which they are imported."""


def missing_packages(extra: str, modules: Collection[str] = ()) -> str:
    """Return the packages of ``extra`` that are not installed, as in ``"mujoco and imageio"``; empty if all are.

    Args:
        extra: a key of `EXTRAS`.
        modules: only these top-level modules of it; default: all.
    """
    packages = EXTRAS[extra]
    return " and ".join(packages[module] for module in modules or packages if find_spec(module) is None)


def install_command(extra: str) -> str:
    """Return the command that installs ``extra``."""
    return f"pip install 'mpdqn[{extra}]'"


def require_extra(extra: str, what: str, modules: Collection[str] = ()) -> None:
    """Check that the packages of ``extra``, which ``what`` needs, are installed; see `missing_packages`.

    Raises:
        ValueError: if one is not; it names the packages and how to install them.
    """
    if missing := missing_packages(extra, modules):
        raise ValueError(f"{what} needs {missing}; {install_command(extra)}")
