"""The folder of a training run: everything that says what was run, and what came out.

results/train/20261123-101500-pong-rainbow-s0/
  config.json        the configuration, the agent's settings, the layout's plan
  environment.json   commit, versions, hardware, command
  status.json        how far it is, see status.py
  checkpoints/       what it can go on from, while it is not finished
  progress.csv       a row every log_every frames, evaluations among them
  tensorboard/       the same for TensorBoard
  records.jsonl      the run as a record, with its settings and its last evaluation
  weights.pt         the online network's state_dict
  policy.pt2         the same network as action values, exported: torch.export.load needs no mpdqn
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpdqn.checkpoint.files import sync_folder
from mpdqn.dqn.acting import ActionValues
from mpdqn.dqn.agents import Agent
from mpdqn.dqn.batch import Batch
from mpdqn.environments import EnvironmentSpec
from mpdqn.files import replacing, write_whole
from mpdqn.records import RECORDS, Record, read_records, without_place, without_places
from mpdqn.train.check import check
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.recorded import (
    CONFIG,
    NOT_RECORDED,
    PROVENANCE,
    plain_settings,
    read_config,
    recorded_version,
    strange_and_missing,
)
from mpdqn.train.resume import check_code, code_named_by

WEIGHTS = "weights.pt"
POLICY = "policy.pt2"


def new_folder(job: TrainJob) -> Path:
    """Make the folder of a run, with a name that no other run has."""
    config = job.config
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "_", f"{stamp}-{config.env}-{config.agent}-s{config.seed}")
    for suffix in ("", *(f"-{count}" for count in range(2, 1000))):  # two runs may start within a second
        with contextlib.suppress(FileExistsError):
            folder = config.out / (name + suffix)
            folder.mkdir(parents=True)
            sync_folder(config.out)
            return folder
    raise FileExistsError(f"{config.out / name} and 998 more exist; choose another --out")


def write_config(folder: Path, job: TrainJob, plan: dict[str, Any], run: str) -> None:
    """Write what will be run: configuration, settings, plan, what the run is called in its checkpoints, and where."""
    config = {name: value for name, value in asdict(job.config).items() if name not in NOT_RECORDED}
    # Where the folder itself lies says nothing to whoever resumes it elsewhere; the other paths are needed for that.
    config |= {name: without_places(config[name]) for name in ("out", "resume")}
    about = {
        "run": run,
        "config": config,
        "settings": asdict(job.settings),
        "network": without_place(job.network_name),
        "spec": asdict(job.spec),
        "layout": job.layout.name,
        "plan": plan,
    }
    write_whole(folder / CONFIG, json.dumps(about, indent=1, default=str) + "\n")
    write_whole(folder / PROVENANCE, json.dumps(asdict(job.environment), indent=1) + "\n")


def write_record(folder: Path, record: Record) -> None:
    """Add the run's record to its folder, in the place of one that says as much: a run may be killed right after it."""
    path = folder / RECORDS
    others = [
        r
        for r in (read_records(path) if path.exists() else ())
        if (r.experiment, r.values.get("frames")) != (record.experiment, record.values["frames"])
    ]
    write_whole(path, "".join(r.to_json() + "\n" for r in (*others, record)))


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write ``weights.pt``, a plain state_dict."""
    with replacing(folder / WEIGHTS) as file:
        torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, file)


def save_policy(folder: Path, network: nn.Sequential, agent: Agent, spec: EnvironmentSpec) -> None:
    """Write ``policy.pt2``: from frames to expected action values, whatever the agent learns, for any batch size.

    Warns:
        UserWarning: if torch cannot export the network, which only one's own can bring about; there is no file then.
    """
    # contiguous: the archive's own reading looks for such tensors
    policy = ActionValues(network.cpu().to(memory_format=torch.contiguous_format), agent).eval()
    frames = torch.zeros((2, *spec.observation_shape), dtype=torch.uint8)
    try:
        program = torch.export.export(policy, (frames,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        with replacing(folder / POLICY) as file:
            torch.export.save(program, file)
    except Exception as error:  # a finished run must not fail for it
        line = " ".join(str(error).split())[:200]
        warnings.warn(
            f"the network could not be exported to {POLICY} ({line}); {WEIGHTS} has its weights", stacklevel=2
        )


def save_batches(folder: Path, rank: int, update: int, batches: list[Batch], weights: dict[str, Tensor]) -> Path:
    """Keep the ``batches`` that led to a loss that is no number, with this rank's weights after them."""
    path = folder / f"failed-update-{update}-rank{rank}.pt"
    kept = [{field.name: getattr(batch, field.name).cpu() for field in fields(batch)} for batch in batches]
    with replacing(path) as file:
        torch.save({"batches": kept, "weights": {name: t.detach().cpu() for name, t in weights.items()}}, file)
    return path


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder tells of it: the checked ``job`` and the trained ``network`` on the CPU."""

    folder: Path
    job: TrainJob
    network: nn.Sequential


def load_run(folder: Path, *, network: str = "", env: str = "", trust: bool = False) -> Run:
    """Return the run in ``folder``, with its final weights.

    Args:
        folder: of the run.
        network: the run's own, given again if it is a function in a file, which is run only then or with ``trust``.
        env: the run's own, given again if it lies in a module, which is imported only then or with ``trust``.
        trust: run whatever code the folder names.

    Raises:
        mpdqn.train.resume.UntrustedCode: for code that only the folder names, before any of it runs.
        ValueError: if the folder is no finished training run of this version, or of another network or environment.
    """
    try:
        settings = read_config(folder)["config"]
        recorded = {name: settings[name] for name in ("network", "env")}
    except (ValueError, KeyError) as error:
        raise _not_finished(folder, error) from error
    if strange := strange_and_missing(settings)[0]:
        raise ValueError(
            f"{folder / CONFIG} has unknown settings {strange}; it is of another version of mpdqn"
            f"{recorded_version(folder)}"
        )
    given = {"network": network, "env": env}
    for name, value in given.items():
        if value and value != recorded[name]:
            raise ValueError(f"{name} is {value} but the run in {folder} has {recorded[name]}; give that one")
    if not trust:
        check_code(folder, code_named_by(recorded["network"], recorded["env"]), given)
    try:
        state = torch.load(folder / WEIGHTS, weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise _not_finished(folder, error) from error
    values = plain_settings(settings) | {"out": folder.parent, "replay_dir": None, "resume": None}
    # Where it ran says nothing about the network: load on one process, whatever the layout was.
    here = {
        "layout": "single@all",
        "device": "cpu",
        "actors": "inline",
        "wandb": False,
        "precision": "auto",
        "compile": "auto",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the run itself has warned of
        job = check(TrainConfig(**values | here))
    trained = job.make_network()
    trained.load_state_dict(state)
    return Run(folder=folder, job=job, network=trained)


def _not_finished(folder: Path, error: Exception) -> ValueError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{folder} is no finished training run: {text}; give the folder that a run printed")
