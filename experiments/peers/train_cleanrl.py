"""DQN on Atari as a plain loop, in the manner of CleanRL's ``dqn_atari.py`` with its settings.

https://docs.cleanrl.dev/rl-algorithms/dqn/#dqn_ataripy

Its wrappers and its buffer are Stable-Baselines3's. Smaller here than published: the buffer, 10,000 transitions for
1,000,000. ε is where it anneals to.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from torch import nn

GAME = "PongNoFrameskip-v4"
EPSILON = 0.01
BUFFER_SIZE = 10_000
TRAIN_FREQUENCY = 4
TARGET_FREQUENCY = 1_000


def cleanrl_training(*, steps: int, warmup: int, tuned: bool) -> Callable[[], None]:
    """``steps`` agent steps, a multiple of 8, and a quarter as many updates a call,
    after ``warmup`` transitions in the buffer.

    As published: one game through gymnasium's wrappers. ``tuned``: eight games stepped in C++ by ale-py, one update for
    each four steps all the same; channels_last and the fused optimizer.
    """
    from stable_baselines3.common.buffers import ReplayBuffer

    envs = _vector_games() if tuned else _wrapped_game()
    n, format_ = envs.num_envs, torch.channels_last if tuned else torch.contiguous_format
    q_network = _Network(int(envs.single_action_space.n)).to(memory_format=format_)
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-4, fused=True if tuned else None)
    buffer = ReplayBuffer(
        BUFFER_SIZE,
        envs.single_observation_space,
        envs.single_action_space,
        "cpu",
        n_envs=n,
        optimize_memory_usage=True,
        handle_timeout_termination=False,
    )
    obs, _ = envs.reset(seed=0)
    step = 0

    def act() -> None:
        nonlocal obs, step
        if random.random() < EPSILON:
            actions = np.array([envs.single_action_space.sample() for _ in range(n)])
        else:
            with torch.no_grad():
                actions = q_network(torch.Tensor(obs)).argmax(dim=1).numpy()
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(truncations):
            real_next_obs[i] = infos["final_obs"][i]
        buffer.add(obs, real_next_obs, actions, rewards, terminations, [{}] * n)
        obs = next_obs
        step += n

    def update() -> None:
        data = buffer.sample(32)
        with torch.no_grad():
            target_max = target_network(data.next_observations.float()).max(dim=1).values
            td_target = data.rewards.flatten() + 0.99 * target_max * (1 - data.dones.flatten())
        q = q_network(data.observations.float()).gather(1, data.actions).squeeze(1)
        loss = nn.functional.mse_loss(td_target, q)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def train() -> None:
        for _ in range(steps // n):
            act()
            for _ in range(step // TRAIN_FREQUENCY - (step - n) // TRAIN_FREQUENCY):
                update()
            if step // TARGET_FREQUENCY > (step - n) // TARGET_FREQUENCY:
                target_network.load_state_dict(q_network.state_dict())

    while step < warmup:
        act()
    return train


class _Network(nn.Module):
    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, num_actions),
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x / 255.0)


def _wrapped_game() -> Any:
    import ale_py
    import gymnasium as gym
    from stable_baselines3.common import atari_wrappers

    gym.register_envs(ale_py)

    def make() -> Any:
        env: Any = gym.wrappers.RecordEpisodeStatistics(gym.make(GAME))
        env = atari_wrappers.NoopResetEnv(env, noop_max=30)
        env = atari_wrappers.MaxAndSkipEnv(env, skip=4)
        env = atari_wrappers.EpisodicLifeEnv(env)
        if "FIRE" in env.unwrapped.get_action_meanings():
            env = atari_wrappers.FireResetEnv(env)
        env = atari_wrappers.ClipRewardEnv(env)
        env = gym.wrappers.ResizeObservation(env, (84, 84))
        env = gym.wrappers.GrayscaleObservation(env)
        return gym.wrappers.FrameStackObservation(env, 4)

    return gym.vector.SyncVectorEnv([make], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def _vector_games() -> Any:
    return AtariVectorEnv("pong", 8, repeat_action_probability=0.0, autoreset_mode="SameStep")
