"""mpdqn's own training and collection: what `experiments.training_speed` calls, and nothing else of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from mpdqn.actors import Actors
from mpdqn.networks import make_network
from mpdqn.replay import VirtualShards

GAME = "pong"
EPSILON = 0.01
FRAMES, ACTIONS = (4, 84, 84), 6
SHARDS, ENVS_PER_SHARD = 8, 8
BUFFER_SIZE = 10_000


def trains() -> bool:
    """Whether this version of mpdqn can train."""
    return importlib.util.find_spec("mpdqn.train") is not None


def mpdqn_training(*, steps: int, warmup: int) -> Callable[[], None]:
    """``steps`` agent steps and a quarter as many updates a call, after ``warmup`` transitions in replay.

    Uniform replay, batches of 32, one process with all threads.
    """
    train: Any = importlib.import_module("mpdqn.train")
    config = train.TrainConfig(env=GAME, agent="dqn", network="nature", batch_size=32)
    progress = iter(train.Trainer.alone(config).run())
    done = goal = 0

    def play() -> None:
        nonlocal done, goal
        goal += steps
        while done < goal:
            done += next(progress).transitions

    goal = warmup
    play()
    return play


def mpdqn_collection(*, steps: int) -> Callable[[], None]:
    """``steps`` agent steps a call, a multiple of 64: `Actors` with the network's policy, stored in replay."""
    shards = VirtualShards(
        observation_shape=FRAMES,
        num_shards=SHARDS,
        envs_per_shard=ENVS_PER_SHARD,
        capacity=BUFFER_SIZE,
        seed=0,
    )
    actors = Actors(policy(), GAME, shards, epsilon=EPSILON, seed=0)

    def collect() -> None:
        actors.collect(steps)

    return collect


def policy() -> torch.nn.Module:
    """The network that collects, the same for mpdqn and for the bare loop."""
    return make_network("nature", FRAMES, ACTIONS, width=None, seed=0)
