"""mpdqn's own training and collection: what `experiments.training_speed` calls, and nothing else of it."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from mpdqn.actors import Actors
from mpdqn.networks import make_network
from mpdqn.replay import VirtualShards

GAME = "pong"
EPSILON = 0.01
FRAMES, ACTIONS = (4, 84, 84), 6
BUFFER_SIZE = 10_000


@dataclass(frozen=True, kw_only=True)
class Games:
    """Number of games played together: each of ``shards`` is one call of the network in each of ``chunk`` steps."""

    shards: int
    per_shard: int
    chunk: int = 1

    def __str__(self) -> str:
        return f"{self.shards} × {self.per_shard} games" + f" in chunks of {self.chunk} steps" * (self.chunk > 1)


# One shard of many games: a network that acts on few frames at a time wastes its convolutions.
TUNED_TRAINING = Games(shards=1, per_shard=32)
TUNED_COLLECTION = Games(shards=1, per_shard=64, chunk=8)
SHIPPED = Games(shards=4, per_shard=2)
"""The defaults of ``mpdqn train`` (a test compares)."""


def mpdqn_training(*, steps: int, warmup: int, games: Games) -> Callable[[], None]:
    """``steps`` agent steps and a quarter as many updates a call, after ``warmup`` transitions in replay.

    DQN as published, with uniform replay and batches of 32, in one process with as many threads as it has; a
    smaller buffer and ε at its end, as the peers have them.
    """
    from mpdqn.train import TrainConfig, Trainer  # collection alone needs none of it

    config = TrainConfig(
        env=GAME,
        agent="dqn",
        network="nature",
        layout=f"single@{torch.get_num_threads()}",
        batch_size=32,
        replay_period=4,
        num_shards=games.shards,
        envs_per_shard=games.per_shard,
        round_steps=games.chunk,
        min_replay=warmup,
        capacity=BUFFER_SIZE,
        frames=10**9,
        epsilon_decay_frames=0,
        evaluation_episodes=0,
    )
    opened = ExitStack()
    atexit.register(opened.close)  # which also keeps it, and the trainer in it, until then
    progress = opened.enter_context(Trainer.alone(config)).run()
    goal = 0

    def play(more: int) -> None:
        nonlocal goal
        goal += more
        while next(progress).transitions < goal:
            pass

    play(warmup)
    return functools.partial(play, steps)


def mpdqn_collection(*, steps: int, games: Games) -> Callable[[], None]:
    """``steps`` agent steps a call, a multiple of one chunk: `Actors` with the network's policy, stored in replay."""
    shards = VirtualShards(
        observation_shape=FRAMES,
        num_shards=games.shards,
        envs_per_shard=games.per_shard,
        capacity=BUFFER_SIZE,
        seed=0,
    )
    actors = Actors(
        policy(),
        GAME,
        owned=shards.owned,
        num_shards=games.shards,
        envs_per_shard=games.per_shard,
        epsilon=EPSILON,
        seed=0,
        steps=games.chunk,
    )

    def collect() -> None:
        for _ in range(steps // (shards.num_envs * games.chunk)):
            actors.play().store(shards)

    return collect


def policy() -> torch.nn.Module:
    """The network that collects, the same for mpdqn and for the bare loop."""
    return make_network("nature", FRAMES, ACTIONS, width=None, seed=0)
