"""From features to action values: the layers at the end of every network.

plain      features ─ fc ─ relu ─ head: Linear ─▶ Q                    Mnih et al. 2015
dueling    features ─ head: ┬ value:     Linear ─ relu ─ Linear ─▶ V ┐
                            └ advantage: Linear ─ relu ─ Linear ─▶ A ┴▶ Q        Wang et al. 2016, Figure 1
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

Head = Literal["plain", "dueling"]


class DuelingHead(nn.Module):
    """Q(s, a) = V(s) + A(s, a) − mean over a' of A(s, a') (Wang et al. 2016, equation 9).

    Each stream has its own hidden layer, as in the paper; the head is one layer of the chain, because its two streams
    read the same features. The paper's rescaling of the gradient that enters the last convolution isn't applied.

    Input: floats ``[B, features]``. Output: ``[B, num_actions]`` in the same dtype.
    """

    def __init__(self, features: int, hidden: int, num_actions: int) -> None:
        super().__init__()
        self.value_fc = nn.Linear(features, hidden)
        self.value = nn.Linear(hidden, 1)
        self.advantage_fc = nn.Linear(features, hidden)
        self.advantage = nn.Linear(hidden, num_actions)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Action values ``[B, num_actions]`` of features ``[B, features]``."""
        value: torch.Tensor = self.value(F.relu(self.value_fc(features)))
        advantage: torch.Tensor = self.advantage(F.relu(self.advantage_fc(features)))
        return value + advantage - advantage.mean(dim=1, keepdim=True)


def head_layers(head: Head, features: int, fc: int, num_actions: int) -> dict[str, nn.Module]:
    """The named layers that turn ``[B, features]`` into ``[B, num_actions]`` with ``fc`` hidden units (per stream).

    Raises:
        ValueError: if ``head`` is neither ``plain`` nor ``dueling``.
    """
    if head == "plain":
        return {"fc": nn.Linear(features, fc), "fc_relu": nn.ReLU(), "head": nn.Linear(fc, num_actions)}
    if head == "dueling":
        return {"head": DuelingHead(features, fc, num_actions)}
    raise ValueError(f"no head is called {head!r}; choose one of {', '.join(get_args(Head))}")
