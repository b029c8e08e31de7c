"""`check`: from a `TrainConfig` to a `TrainJob`, every refusal that needs no worker on the way."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpdqn.dqn.prioritization import Prioritization
from mpdqn.dqn.published import Published, brought_to, published
from mpdqn.environments import EnvironmentSpec, environment_spec
from mpdqn.launched import launched, launched_local_world_size, launched_world_size
from mpdqn.layouts import Layout
from mpdqn.logs import check_logs
from mpdqn.records import Environment
from mpdqn.replay.rows import FRAMES, full, occupied
from mpdqn.replay.shard import ring_shape
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.mapped import owner
from mpdqn.train.resume import check_resume, recorded_config, run_id
from mpdqn.workload import Workload
from mpdqn.workload.checks import (
    check_actions,
    check_arithmetic,
    check_at_least,
    check_binary,
    check_choice,
    check_division,
    check_gpu_sharing,
    check_stages,
    check_update,
    check_writable,
    warn_of_gaps,
)

DTYPES = ("float32", "float64")


def check(config: TrainConfig) -> TrainJob:
    """Every check that needs no worker: one clear ValueError for bad input, on every rank alike."""
    config = config.resolved()
    if config.resume is not None:
        check_resume(config)
    check_at_least(config, 1, "frames", "num_shards", "envs_per_shard", "round_steps", "keep_checkpoints")
    check_at_least(
        *(config, 0, "actor_lag", "env_workers", "evaluate_every", "evaluation_episodes", "log_every"),
        *("epsilon_decay_frames", "checkpoint_minutes", "checkpoint_every"),
    )
    check_update(config)
    check_binary(config, "prefetch")
    check_choice("dtype", config.dtype, DTYPES)
    check_arithmetic(device=config.device, precision=config.precision, compile=config.compile, dtype=config.dtype)
    spec = environment_spec(config.env)
    workload = Workload(
        env=config.env,
        spec=spec,
        settings=_settings(config, spec),
        network=config.network,
        width=config.width,
        num_shards=config.num_shards,
        envs_per_shard=config.envs_per_shard,
        seed=config.seed,
        dtype=config.dtype,
    )
    check_actions(workload)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    layout = Layout.parse(config.layout, cores=len(cores))
    if layout.copies > 1:
        raise ValueError(f"layout {layout.name} is {layout.copies} runs; train one at a time, each with its --seed")
    check_division(layout, workload)
    devices = torch.cuda.device_count() if config.device == "cuda" else 0
    job = TrainJob(
        config=config,
        workload=workload,
        layout=layout,
        cores=cores,
        environment=Environment.current(f"{devices} × {torch.cuda.get_device_name()}" if devices else ""),
    )
    per_round = job.frames_after(1)
    if per_round > config.frames:
        raise ValueError(
            f"a round of {job.num_envs} environments × {config.round_steps} steps is {per_round} frames but only "
            f"{config.frames} are to be played; lower --round-steps or raise --frames"
        )
    job = replace(job, workload=replace(workload, settings=_annealed(job)))
    _check_replay(job)
    _check_ranks(job, devices)
    check_stages([layout], job.make_network(warn=True), job.network_name)
    warn_of_gaps([layout], config.lookahead)
    check_logs(wandb=config.wandb)
    if config.resume is not None:
        check_writable(config.resume, "--resume")
    else:
        check_writable(config.out)
    if config.replay_dir is not None:
        _check_replay_dir(job, config.replay_dir)
    _warn_of_space(job)
    return job


def _settings(config: TrainConfig, spec: EnvironmentSpec) -> Published:
    """The agent's published settings, MinAtar's there, with what the configuration says otherwise."""
    base = brought_to(published(config.agent), spec.name, spec.field)
    positive = ["n_step", "batch_size", "learning_rate", "replay_period", "capacity", "target_period", "target_tau"]
    names = [*positive, "min_replay", "evaluation_epsilon"]
    given: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    for name in positive:
        if name in given and not given[name] > 0:
            raise ValueError(f"{name} is {given[name]} but must be above 0")
    switches = {name: value for name in ("double", "dueling", "noisy") if (value := getattr(config, name)) is not None}
    if switches:
        given["agent"] = replace(base.agent, **switches)
    if config.noisy is False and not base.epsilon.start:  # else nothing would explore
        base = replace(base, epsilon=brought_to(published("dqn"), spec.name, spec.field).epsilon)
    if config.prioritized is not None:
        given["prioritization"] = (base.prioritization or Prioritization()) if config.prioritized else None
    for name, value in given.items():
        if name in ("target_tau", "evaluation_epsilon") and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value} but must be between 0 and 1")
    if config.epsilon_decay_frames is not None:
        if base.epsilon.start == base.epsilon.end:
            warnings.warn(
                f"epsilon_decay_frames={config.epsilon_decay_frames} has no effect: the ε of agent {config.agent} is "
                f"{base.epsilon.end:g} from the start",
                stacklevel=3,
            )
        given["epsilon"] = replace(base.epsilon, decay_frames=config.epsilon_decay_frames)
    return replace(base, **given)


def _annealed(job: TrainJob) -> Published:
    """The settings with a β that reaches 1 at the end of this run, where the paper lets it rise over the run."""
    priorities = job.settings.prioritization
    if priorities is None or not priorities.beta_updates:
        return job.settings
    updates = max(1, job.updates_after(job.num_rounds))
    return replace(job.settings, prioritization=replace(priorities, beta_updates=updates))


def _check_replay(job: TrainJob) -> None:
    settings, config = job.settings, job.config
    least = job.workload.least_transitions
    if settings.min_replay < least:
        raise ValueError(
            f"min_replay is {settings.min_replay} but batch_size {settings.batch_size} and {job.num_envs} environments "
            f"with {settings.n_step}-step returns need at least {least} transitions before the first update"
        )
    if settings.capacity < settings.min_replay:
        raise ValueError(
            f"capacity is {settings.capacity} but learning begins at {settings.min_replay} transitions (--min-replay); "
            "raise the one or lower the other"
        )
    if not job.updates_after(job.num_rounds):
        warnings.warn(
            f"{config.frames} frames are {config.frames // job.spec.frames_per_action} agent steps, but learning "
            f"begins at {settings.min_replay}: nothing will be learned; raise --frames or lower --min-replay",
            stacklevel=3,
        )


def _check_ranks(job: TrainJob, devices: int) -> None:
    config, layout = job.config, job.layout
    if config.actors not in ("inline", "workers"):
        raise ValueError(f"unknown actors {config.actors!r}; choose inline or workers")
    if config.actors == "workers" and config.device == "cuda":
        raise ValueError("--actors workers acts on the CPU and is not there for --device cuda yet; use --actors inline")
    if launched() and job.num_ranks != launched_world_size():
        raise ValueError(
            f"layout {layout.name} with {config.actors} actors needs {job.num_ranks} ranks but "
            f"{launched_world_size()} processes were started; use --nproc-per-node {job.num_ranks}"
        )
    here = launched_local_world_size() if launched() else layout.ranks
    check_gpu_sharing(layout, here, devices)


def _check_replay_dir(job: TrainJob, folder: Path) -> None:
    """Raise ValueError if ``folder`` cannot be written, holds another run's replay or has too little space for this."""
    spec, config = job.spec, job.config
    check_writable(folder, "--replay-dir")
    own = config.resume is not None and folder == recorded_config(config.resume).replay_dir
    run = None if config.resume is None else run_id(config.resume)
    # What a killed attempt to go on has mapped there is the run's own, whatever its folder says yet.
    shards = () if own else folder.glob("shard-*")
    held = [path for path in shards if occupied(path) and (run is None or owner(path) != run)]
    if held:
        raise ValueError(f"--replay-dir {folder} already holds {held[0].name}; delete it or choose another")
    if launched() and launched_local_world_size() < launched_world_size():  # hosts share it, or have their own
        return
    each = -(-job.settings.capacity // config.num_shards)
    shape = ring_shape(spec.observation_shape, each, config.envs_per_shard, spec.stack, job.settings.n_step)
    freed = sum(path.stat().st_size for path in folder.glob(f"shard-*/{FRAMES}")) if run else 0
    needed, free = config.num_shards * math.prod(shape), shutil.disk_usage(folder).free + freed
    if needed > free:
        raise ValueError(str(full(needed, free, folder)))


def _warn_of_space(job: TrainJob) -> None:
    """Warn if the checkpoints' frames will not go where they are to be; training itself does not need them."""
    config = job.config
    if not (config.checkpoint_minutes or config.checkpoint_every):
        return
    each = -(-job.settings.capacity // config.num_shards)
    shape = ring_shape(job.spec.observation_shape, each, config.envs_per_shard, job.spec.stack, job.settings.n_step)
    played = job.num_rounds * job.transitions_per_round * math.prod(shape[1:])
    needed, where = min(config.num_shards * math.prod(shape), played), config.replay_dir or config.resume or config.out
    free = shutil.disk_usage(where).free
    if needed > free:
        warnings.warn(
            f"checkpoints will need {needed / 2**30:.2f} GiB for the frames of replay in {where} but "
            f"{free / 2**30:.2f} GiB are free; make room, lower --capacity, or set --checkpoint-minutes 0",
            stacklevel=3,
        )
