"""A DQN update with TorchRL's `DQNLoss`, in the manner of its shipped ``sota-implementations/dqn/dqn_atari.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, HardUpdate

from mpdqn.dqn.batch import Batch


def torchrl_loss(network: nn.Module, batch: Batch, num_actions: int, *, tuned: bool) -> Callable[[], None]:
    """One DQN update on ``batch`` per call: `DQNLoss` with a delayed target network, Adam.

    As published: torch's default memory format and optimizer. ``tuned``: channels_last and the fused optimizer.
    """
    from torchrl.data import Categorical

    if tuned:
        network = network.to(memory_format=torch.channels_last)
    actor = QValueActor(network, in_keys=["observation"], spec=Categorical(num_actions))
    loss_module = DQNLoss(actor, loss_function="smooth_l1", delay_value=True, action_space="categorical")
    loss_module.make_value_estimator(gamma=0.99)
    target_updater = HardUpdate(loss_module, value_network_update_interval=2_000)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=6.25e-5, eps=1.5e-4, fused=True if tuned else None)
    ended = (batch.discount == 0).unsqueeze(1)
    data = TensorDict(
        {
            "observation": batch.obs,
            "action": batch.action,
            "next": {
                "observation": batch.next_obs,
                "reward": batch.reward.unsqueeze(1),
                "done": ended,
                "terminated": ended,
            },
        },
        batch_size=[len(batch)],
    )

    def update() -> None:
        loss = loss_module(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target_updater.step()

    return update
