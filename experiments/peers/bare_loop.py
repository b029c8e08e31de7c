"""Games and a policy, and nothing else: what collection could reach at most."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv

from experiments.peers.train_mpdqn import ACTIONS, EPSILON, Games, policy


def bare_loop(*, steps: int, games: Games) -> Callable[[], None]:
    """``steps`` agent steps a call, a multiple of the number of ``games``, without any storage."""
    n = games.shards * games.per_shard
    vector, network, random = AtariVectorEnv("pong", n, reward_clipping=False), policy(), np.random.default_rng(0)
    observation, _ = vector.reset(seed=0)

    @torch.inference_mode()
    def collect() -> None:
        nonlocal observation
        for _ in range(steps // n):
            best = network(torch.from_numpy(observation)).argmax(dim=1).numpy()
            action = np.where(random.random(n) < EPSILON, random.integers(ACTIONS, size=n), best)
            observation = vector.step(action)[0]

    return collect
