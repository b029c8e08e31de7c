"""`check`: from a `TrainConfig` to a `TrainJob`, every refusal that needs no worker on the way."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpdqn.dqn.prioritization import Prioritization
from mpdqn.dqn.published import Published, brought_to, published
from mpdqn.environments import EnvironmentSpec, environment_spec
from mpdqn.launch import check_port
from mpdqn.layouts import Layout
from mpdqn.logs import check_logs
from mpdqn.mesh import check_device, launched, launched_local_world_size, launched_world_size
from mpdqn.plan import RECOMPUTATION
from mpdqn.records import Environment
from mpdqn.replay.rows import FRAMES, full
from mpdqn.replay.shard import ring_shape
from mpdqn.schedule import SCHEDULES
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.resume import check_resume, recorded_config

PRECISIONS, KERNELS = ("float32", "tf32", "bf16", "auto"), ("auto", "on", "off")
DTYPES = ("float32", "float64")


def check(config: TrainConfig) -> TrainJob:
    """Every check that needs no worker: one clear ValueError for bad input, on every rank alike."""
    config = config.resolved()
    if config.resume is not None:
        check_resume(config)
    for name in ("frames", "num_shards", "envs_per_shard", "round_steps", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)} but must be at least 1")
    least_0 = ("actor_lag", "env_workers", "evaluate_every", "evaluation_episodes", "log_every", "epsilon_decay_frames")
    for name in (*least_0, "checkpoint_minutes", "checkpoint_every"):
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(config, name)} but must be at least 0")
    for name in ("lookahead", "prefetch"):
        if getattr(config, name) not in (0, 1):
            raise ValueError(f"{name} is {getattr(config, name)} but must be 0 or 1")
    if config.recompute not in RECOMPUTATION:
        raise ValueError(f"unknown recompute {config.recompute!r}; choose {', '.join(RECOMPUTATION)}")
    if config.dtype == "float64" and config.precision not in ("auto", "float32"):
        raise ValueError(f"precision {config.precision} has no effect on dtype float64; leave one of them")
    if config.device == "cpu" and config.precision == "tf32":
        raise ValueError("precision tf32 is CUDA's, and --device is cpu; use float32 or bf16")
    if not config.timeout > 0:
        raise ValueError(f"timeout is {config.timeout} s but must be above 0")
    for name, choices in (("precision", PRECISIONS), ("compile", KERNELS), ("dtype", DTYPES)):
        if getattr(config, name) not in choices:
            raise ValueError(
                f"unknown {name} {getattr(config, name)!r}; choose {', '.join(choices[:-1])} or {choices[-1]}"
            )
    check_device(config.device)
    spec = environment_spec(config.env)
    settings = _settings(config, spec)
    _check_actions(config, settings, spec)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    layout = Layout.parse(config.layout, num_microbatches=4, cores=len(cores))
    if layout.copies > 1:
        raise ValueError(f"layout {layout.name} is {layout.copies} runs; train one at a time, each with its --seed")
    layout.parallelism.check_batch(settings.batch_size)
    layout.parallelism.check_shards(config.num_shards, settings.batch_size)
    devices = torch.cuda.device_count() if config.device == "cuda" else 0
    job = TrainJob(
        config=config,
        settings=settings,
        spec=spec,
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
    job = replace(job, settings=_annealed(job))
    _check_replay(job)
    _check_ranks(job, devices)
    _check_network(job)
    if SCHEDULES[layout.schedule].filled and layout.pipeline > 1 and not config.lookahead:
        warnings.warn(
            f"with --lookahead 0 no target pass can run ahead, so no gaps are filled in {layout.name}; set "
            "--lookahead 1",
            stacklevel=2,
        )
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


def _check_actions(config: TrainConfig, settings: Published, spec: EnvironmentSpec) -> None:
    if spec.branches and not settings.agent.branching:
        raise ValueError(
            f"environment {config.env} has {spec.branches} action dimensions of {spec.num_actions} choices each, but "
            f"agent {config.agent} has one head of discrete actions; use --agent decqn, whose head branches"
        )
    if settings.agent.branching and not spec.branches:
        raise ValueError(
            f"agent {config.agent} has a branching head but environment {config.env} has 1 discrete action of "
            f"{spec.num_actions} choices; use --agent dqn or another without branches"
        )


def _check_replay(job: TrainJob) -> None:
    settings, config = job.settings, job.config
    # Each shard must be able to give its part of a batch; rows at the head of a ring wait for their n-step return.
    least = settings.batch_size + job.num_envs * settings.n_step
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
    if launched():
        if job.num_ranks != launched_world_size():
            raise ValueError(
                f"layout {layout.name} with {config.actors} actors needs {job.num_ranks} ranks but "
                f"{launched_world_size()} processes were started; use --nproc-per-node {job.num_ranks}"
            )
    else:
        check_port(config.port)
    here = launched_local_world_size() if launched() else layout.ranks
    if 0 < devices < here and layout.pipeline > 1 and not layout.stacked:
        raise ValueError(
            f"layout {layout.name} sends messages between GPUs but {here} ranks share {devices} here; write +stacked, "
            "as in pp2-1f1b+stacked, or choose a layout of fewer ranks"
        )


def _check_network(job: TrainJob) -> None:
    chain = job.make_network(warn=True)
    trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in chain)
    if job.layout.parallelism.num_stages > trained:
        raise ValueError(
            f"layout {job.layout.name} wants p·v = {job.layout.parallelism.num_stages} stages but {job.network_name} "
            f"has {trained} layers with parameters to train, and every stage needs one; use at most that many stages"
        )


def _check_replay_dir(job: TrainJob, folder: Path) -> None:
    """Raise ValueError if ``folder`` cannot be written, holds another run's replay or has too little space for this."""
    spec, config = job.spec, job.config
    check_writable(folder, "--replay-dir")
    own = config.resume is not None and folder == recorded_config(config.resume).replay_dir
    held = [path for path in folder.glob("shard-*") if not path.is_dir() or any(path.iterdir())]
    if held and not own:
        raise ValueError(f"--replay-dir {folder} already holds {held[0].name}; delete it or choose another")
    if launched() and launched_local_world_size() < launched_world_size():  # hosts share it, or have their own
        return
    each = -(-job.settings.capacity // config.num_shards)
    shape = ring_shape(spec.observation_shape, each, config.envs_per_shard, spec.stack, job.settings.n_step)
    freed = sum(path.stat().st_size for path in folder.glob(f"shard-*/{FRAMES}")) if own else 0
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


def check_writable(out: Path, flag: str = "--out") -> None:
    """Raise ValueError unless files can be made in the folder ``out`` of ``flag``; it is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".writable-"):  # a name that no other host has either
            pass
    except OSError as error:
        raise ValueError(f"{flag} {out} cannot be written ({error.strerror}); choose another folder") from error
