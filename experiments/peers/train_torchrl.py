"""TorchRL's DQN on Atari in the manner of its shipped ``sota-implementations/dqn``, settings of its config_atari.yaml.

https://github.com/pytorch/rl/tree/main/sota-implementations/dqn

An iteration collects 400 agent steps from one game, stores both stacks of each transition as float32, and makes 100
updates. Smaller here than published: the buffer (10,000 transitions for 1,000,000, which would take 226 GB of disk) and
the random steps before the first update. ε is where it anneals to, since a run spends nine tenths of its steps there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GAME = "PongNoFrameskip-v4"
EPSILON = 0.01
BUFFER_SIZE = 10_000


def torchrl_training(*, steps: int, warmup: int, scratch: str) -> Callable[[], None]:
    """``steps`` agent steps and a quarter as many updates a call, after ``warmup`` transitions in the buffer.

    The buffer is mapped to files in the folder ``scratch``, 226 kB for each transition.
    """
    from tensordict.nn import TensorDictSequential
    from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
    from torchrl.modules import EGreedyModule
    from torchrl.objectives import DQNLoss, HardUpdate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own parts deprecate of one another
        model = _model()
        explore = EGreedyModule(spec=model.spec, eps_init=EPSILON, eps_end=EPSILON, annealing_num_steps=1)
        collector = _collector(TensorDictSequential(model, explore), steps)
        loss_module = DQNLoss(value_network=model, loss_function="l2", delay_value=True)
        loss_module.set_keys(done="end-of-life", terminated="end-of-life")
        loss_module.make_value_estimator(gamma=0.99)
        target_updater = HardUpdate(loss_module, value_network_update_interval=10_000)
    buffer = TensorDictReplayBuffer(storage=LazyMemmapStorage(max_size=BUFFER_SIZE, scratch_dir=scratch), batch_size=32)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=2.5e-4)
    batches = iter(collector)
    for _ in range(-(-warmup // steps)):
        buffer.extend(next(batches).reshape(-1))

    def iteration() -> None:
        buffer.extend(next(batches).reshape(-1))
        for _ in range(steps // 4):
            loss = loss_module(buffer.sample())["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(loss_module.parameters()), max_norm=10.0)
            optimizer.step()
            target_updater.step()
        collector.update_policy_weights_()

    return iteration


def torchrl_collection(*, steps: int) -> Callable[[], None]:
    """``steps`` agent steps a call: its collector, environment and greedy policy alone, without storage or updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = iter(_collector(_model(), steps))

    def collect() -> None:
        next(batches)

    return collect


def _collector(policy: Any, steps: int) -> Any:
    from torchrl.collectors import Collector

    return Collector(
        create_env_fn=_environment(),
        policy=policy,
        frames_per_batch=steps,
        total_frames=-1,
        device="cpu",
        storing_device="cpu",
        max_frames_per_traj=-1,
    )


def _environment() -> Any:
    import ale_py
    import gymnasium
    from torchrl import envs

    gymnasium.register_envs(ale_py)
    game = envs.GymEnv(
        GAME, frame_skip=4, from_pixels=True, pixels_only=False, device="cpu", categorical_action_encoding=True
    )
    environment = envs.TransformedEnv(game)
    for transform in (
        envs.NoopResetEnv(noops=30, random=True),
        envs.EndOfLifeTransform(),
        envs.SignTransform(in_keys=["reward"]),
        envs.ToTensorImage(),
        envs.GrayScale(),
        envs.Resize(84, 84),
        envs.CatFrames(N=4, dim=-3),
        envs.RewardSum(),
        envs.StepCounter(max_steps=4500),
        envs.DoubleToFloat(),
        envs.VecNorm(in_keys=["pixels"]),
    ):
        environment.append_transform(transform)
    return environment


def _model() -> Any:
    from torchrl.data import Composite
    from torchrl.modules import MLP, ConvNet, QValueActor

    environment = _environment()
    shape, spec = environment.observation_spec["pixels"].shape, environment.action_spec
    environment.close()
    cnn = ConvNet(
        activation_class=nn.ReLU, num_cells=[32, 64, 64], kernel_sizes=[8, 4, 3], strides=[4, 2, 1], device="cpu"
    )
    features = cnn(torch.ones(shape)).shape[-1]
    mlp = MLP(in_features=features, activation_class=nn.ReLU, out_features=spec.space.n, num_cells=[512], device="cpu")
    return QValueActor(module=nn.Sequential(cnn, mlp), spec=Composite(action=spec), in_keys=["pixels"])
