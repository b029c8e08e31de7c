"""Stable-Baselines3's DQN on Atari in the manner of its documentation.

https://stable-baselines3.readthedocs.io/en/master/guide/examples.html#atari-games

Smaller here than its defaults: the buffer, 10,000 transitions for 1,000,000. ε is where it anneals to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

GAME = "PongNoFrameskip-v4"
EPSILON = 0.05
BUFFER_SIZE = 10_000


def sb3_training(*, steps: int, warmup: int, tuned: bool) -> Callable[[], None]:
    """``steps`` agent steps, a multiple of 16, and a quarter as many updates a call,
    after ``warmup`` transitions in the buffer.

    As published: one game. ``tuned``: four games a step, one update for each four steps all the same; channels_last
    and the fused optimizer.
    """
    import ale_py
    import gymnasium
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    num_envs = 4 if tuned else 1
    model = DQN(
        "CnnPolicy",
        VecFrameStack(make_atari_env(GAME, n_envs=num_envs, seed=0), n_stack=4),
        buffer_size=BUFFER_SIZE,
        learning_starts=warmup,
        exploration_initial_eps=EPSILON,
        gradient_steps=num_envs,  # its train_freq of 4 counts steps of the vector
        policy_kwargs={"optimizer_kwargs": {"fused": True}} if tuned else None,
        device="cpu",
        seed=0,
    )
    if tuned:
        for network in (model.q_net, model.q_net_target):
            network.to(memory_format=torch.channels_last)
    model.set_logger(Logger(folder=None, output_formats=[]))  # its own makes a folder in every call of learn
    model.learn(warmup)
    return functools.partial(_learn, model, steps)


def _learn(model: object, steps: int) -> None:
    model.learn(steps, reset_num_timesteps=False)  # type: ignore[attr-defined]
