"""Going on with a run: what its folder says of it, and what may be other than before."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.mesh import launched
from mpdqn.train.config import TrainConfig
from mpdqn.train.lock import FolderInUse
from mpdqn.train.status import FINISHED, RUNNING, read_status

CONFIG = "config.json"

MAY_CHANGE = (
    *("layout", "actors", "env_workers", "recompute", "precision", "compile", "device"),
    *("replay_dir", "timeout", "wandb", "out", "resume"),
    *("evaluate_every", "evaluation_episodes", "log_every", "frames"),
    *("checkpoint_minutes", "checkpoint_every", "checkpoint_at_end", "keep_checkpoints"),
)
"""Settings that say where and how a run is computed, watched and kept. All others make it the run that it is."""


def recorded_config(folder: Path) -> TrainConfig:
    """The configuration of the run in ``folder``, to go on with.

    Raises:
        ValueError: if there is none, or it is of another version or another command.
    """
    about = _read_config(folder)
    values = about["config"] | {"resume": folder, "out": folder.parent}
    if values["replay_dir"] is not None:
        values["replay_dir"] = Path(values["replay_dir"])
    return TrainConfig(**values)


def run_id(folder: Path) -> str:
    """What the run in ``folder`` is called in its checkpoints; ValueError as `recorded_config`."""
    return str(_read_config(folder)["run"])


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir() or not any(folder.iterdir()):
        kind = "is empty" if folder.is_dir() else "does not exist" if not folder.exists() else "is no folder"
        raise ValueError(f"{folder} {kind}; give the folder that a training run made, with its {CONFIG}")
    try:
        about = json.loads((folder / CONFIG).read_text())
        known = {field.name for field in fields(TrainConfig)}
        strange, missing = sorted(set(about["config"]) - known), sorted(known - set(about["config"]))
        about["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no training run to go on with ({error!r}); give the folder that a training run made"
        ) from error
    if strange or missing:
        raise ValueError(
            f"{folder / CONFIG} has the settings {strange} too many and {missing} too few; resume with the version of "
            "mpdqn that began the run"
        )
    return dict(about)


def check_resume(config: TrainConfig) -> None:
    """Raise ValueError unless ``config`` goes on with the run in the folder ``config.resume``.

    Raises:
        ValueError: if that is no run, is another one, has ended, or is being trained now; with both values.
    """
    folder = config.resume
    assert folder is not None
    recorded = recorded_config(folder)
    for field in fields(TrainConfig):
        before, asked = getattr(recorded, field.name), getattr(config, field.name)
        if field.name not in MAY_CHANGE and before != asked:
            raise ValueError(
                f"{field.name} is {asked} but the run in {folder} has {before}; leave it out, or start a new run "
                "without --resume"
            )
    if config.frames < recorded.frames:
        raise ValueError(
            f"frames is {config.frames} but the run in {folder} has {recorded.frames}; give as many or more"
        )
    try:
        status = read_status(folder)
    except ValueError:  # it was killed before it had one, or the power went
        return
    if status.state == RUNNING and not launched():  # the ranks of a launched run see to it together
        raise FolderInUse(
            f"{folder} is being trained by process {status.pid} on {status.host}; wait for it or end it first"
        )
    if status.state == FINISHED and config.frames == recorded.frames:
        raise ValueError(
            f"the run in {folder} is finished, all its {recorded.frames} frames are played; give more --frames"
        )
    if status.state == FINISHED and not CheckpointFolder(folder, recorded.replay_dir).found():
        raise ValueError(
            f"the run in {folder} is finished and has no checkpoint of its end, to train on to {config.frames} frames; "
            "a run that is to be longer one day needs --checkpoint-at-end"
        )
