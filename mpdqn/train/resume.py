"""Going on with a run: what its folder says of it, and what may be other than before."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mpdqn.checkpoint.entries import check_text, printable
from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.environments.own import module_of
from mpdqn.files import check_plain
from mpdqn.launched import launched
from mpdqn.logs import check_log_files
from mpdqn.networks import names_code
from mpdqn.records import RECORDS
from mpdqn.train.config import TrainConfig
from mpdqn.train.lock import FolderInUse
from mpdqn.train.recorded import CONFIG, plain_settings, read_config, recorded_version, strange_and_missing
from mpdqn.train.status import FINISHED, RUNNING, read_status

MAY_CHANGE = (
    *("layout", "actors", "env_workers", "recompute", "precision", "compile", "device"),
    *("replay_dir", "timeout", "wandb", "out", "resume", "trust"),
    *("evaluate_every", "evaluation_episodes", "log_every", "frames"),
    *("checkpoint_minutes", "checkpoint_every", "checkpoint_at_end", "keep_checkpoints"),
)
"""Settings that say where and how a run is computed, watched and kept. All others make it the run that it is."""


class UntrustedCode(ValueError):
    """A run's folder names code of its own, which its user did not ask for."""


def recorded_config(folder: Path) -> TrainConfig:
    """Return the configuration of the run in ``folder``, to resume it.

    ``network`` and ``env`` are empty where they name code: whoever resumes the run gives them again, or trusts the
    folder (`with_trusted_code`). Nothing that the folder names is run or imported.

    Raises:
        ValueError: if there is none, or it is of another version or another command.
    """
    config = _recorded(folder)
    code = code_named_by(config.network, config.env)
    return replace(
        config,
        network="" if "network" in code else config.network,
        env="" if "env" in code else config.env,
    )


def with_trusted_code(config: TrainConfig) -> TrainConfig:
    """Return ``config`` with the names of code that the folder ``config.resume`` has and ``config`` leaves empty."""
    assert config.resume is not None
    recorded = _recorded(config.resume)
    code = code_named_by(recorded.network, recorded.env)
    return replace(config, network=config.network or code.get("network", ""), env=config.env or code.get("env", ""))


def code_named_by(network: str, env: str) -> dict[str, str]:
    """Return the settings among these that name code: a function in a file, or an environment in a module."""
    names = {"network": network} if names_code(network) else {}
    return names | ({"env": env} if module_of(env) else {})


def check_code(folder: Path, named: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raise UntrustedCode, with the code that would run, unless all that ``folder`` has ``named`` is ``given`` too."""
    if missing := {name: value for name, value in named.items() if not given[name]}:
        flags = " ".join(f"--{n} {shlex.quote(v) if v.isprintable() else repr(v)}" for n, v in missing.items())
        raise UntrustedCode(
            f"{folder} names code of its own that would run: {flags}; if you trust that code, give {flags} yourself, "
            "or --trust"
        )


def run_id(folder: Path) -> str:
    """What the run in ``folder`` is called in its checkpoints; ValueError as `recorded_config`."""
    return str(_read(folder)["run"])


def _recorded(folder: Path) -> TrainConfig:
    """The configuration of the run in ``folder`` with everything that it names; errors as `recorded_config`."""
    values = plain_settings(_read(folder)["config"]) | {"resume": folder, "out": folder.parent}
    if values["replay_dir"] is not None:
        values["replay_dir"] = Path(values["replay_dir"])
    return TrainConfig(**values)


def _read(folder: Path) -> dict[str, Any]:
    """The folder's configuration, checked to be of a training run of this version."""
    if not folder.is_dir() or not any(folder.iterdir()):
        kind = "is empty" if folder.is_dir() else "does not exist" if not folder.exists() else "is no folder"
        raise ValueError(f"{folder} {kind}; give the folder that a training run made, with its {CONFIG}")
    try:
        about = read_config(folder)
        check_text("run", about.get("run"))
    except ValueError as error:
        raise ValueError(
            f"{folder} holds no training run to go on with ({error}); give the folder that a training run made"
        ) from error
    strange, missing = strange_and_missing(about["config"])
    if strange or missing:
        raise ValueError(
            f"{folder / CONFIG} has the settings {strange} too many and {missing} too few; resume with the version of "
            f"mpdqn that began the run{recorded_version(folder)}"
        )
    return about


def check_written(folder: Path) -> None:
    """Raise ValueError if what a run goes on writing in ``folder`` is a link to somewhere else."""
    check_plain(folder / RECORDS)
    check_log_files(folder)
    CheckpointFolder(folder).check_links()


def check_resume(config: TrainConfig) -> None:
    """Raise ValueError unless ``config`` goes on with the run in the folder ``config.resume``.

    Raises:
        UntrustedCode: if the run's folder names code that ``config`` does not name too.
        ValueError: if that is no run, is another one, has ended, or is being trained now; with both values. Also if
            a file or folder of it is a link where the run goes on writing.
    """
    folder = config.resume
    assert folder is not None
    recorded = _recorded(folder)
    check_written(folder)
    check_code(folder, code_named_by(recorded.network, recorded.env), {"network": config.network, "env": config.env})
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
            f"{folder} is being trained by process {status.pid} on {printable(status.host)}; wait for it or end it "
            "first"
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
