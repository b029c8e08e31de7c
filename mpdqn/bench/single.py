"""mpdqn's update in a single process, as a contender of a speed comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mpdqn.allocator import keep_freed_memory
from mpdqn.dqn.agents import dqn
from mpdqn.dqn.batch import Batch
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.networks import choose_memory_format, set_memory_format
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.randomness import keyed_seed


def random_batch(frames: tuple[int, int, int], num_actions: int, batch_size: int, seed: int) -> Batch:
    """A batch of random frames in memory, for measuring speed."""
    draw = torch.Generator().manual_seed(keyed_seed("random batch", seed))
    shape = (batch_size, *frames)
    return Batch(
        obs=torch.randint(256, shape, dtype=torch.uint8, generator=draw),
        next_obs=torch.randint(256, shape, dtype=torch.uint8, generator=draw),
        action=torch.randint(num_actions, (batch_size,), generator=draw),
        reward=torch.randn(batch_size, generator=draw),
        discount=torch.full((batch_size,), 0.99),
        weight=torch.ones(batch_size),
        index=torch.arange(batch_size),
    )


def learner_update(network: nn.Sequential, batch: Batch, frames: tuple[int, int, int]) -> Callable[[], None]:
    """One DQN update of a `Learner` on ``batch`` per call, in the memory format that is measured to be faster here.

    This process becomes a world of one and keeps its freed memory, as the workers of `mpdqn compare` do.
    """
    keep_freed_memory()
    world = World.open()
    set_memory_format(network, choose_memory_format(network, batch.obs))
    agent = dqn()
    plan = Plan.rectangular(Partition(boundaries=(0, len(network))), Parallelism())
    learner = Learner(
        network, mesh=Mesh(world, plan, agent.letters), agent=agent, batch_size=len(batch), observation_shape=frames
    )

    def update() -> None:
        learner.learn(batch)

    return update
