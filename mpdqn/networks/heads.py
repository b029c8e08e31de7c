"""From features to action values: the layers at the end of every network.

plain      features ─ fc ─ relu ─ head: Linear ─▶ Q                    Mnih et al. 2015
dueling    features ─ head: ┬ value:     Linear ─ relu ─ Linear ─▶ V ┐
                            └ advantage: Linear ─ relu ─ Linear ─▶ A ┴▶ Q        Wang et al. 2016, Figure 1

Each is also there with K logits for each action instead of a value (C51, HL-Gauss), for actions of D dimensions
(DecQN), and with all its linear layers noisy (Fortunato et al. 2018; Rainbow has all of this but D):

    output     one value       K > 1 atoms
    D = 0      [B, A]          [B, A, K]
    D ≥ 1      [B, D, A]       [B, D, A, K]
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from mpdqn.networks.noisy import NoisyLinear

Head = Literal["plain", "dueling"]


def output_shape(num_actions: int, num_atoms: int = 1, branches: int = 0) -> tuple[int, ...]:
    """What a network returns for each frame: ([D,] A [, K]).

    Raises:
        ValueError: for fewer than 1 atom, or fewer than 0 branches.
    """
    if num_atoms < 1:
        raise ValueError(f"num_atoms is {num_atoms} but must be at least 1, which is one value for each action")
    if branches < 0:
        raise ValueError(f"branches is {branches} but must be at least 0; D for actions of D dimensions")
    return (*[branches] * (branches > 0), num_actions, *[num_atoms] * (num_atoms > 1))


class DuelingHead(nn.Module):
    """Q(s, a) = V(s) + A(s, a) − mean over a' of A(s, a') (Wang et al. 2016, equation 9).

    Each stream has its own hidden layer, as in the paper; the head is one layer of the chain, because its two streams
    read the same features. The paper's rescaling of the gradient that enters the last convolution isn't applied. With
    K atoms every logit is such a sum (Hessel et al. 2018), V having K outputs; with D branches all share one V and
    each has its own mean (Tavakoli et al. 2018).

    Input: floats ``[B, features]``. Output: ``[B, num_actions]`` in the same dtype, or see `output_shape`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        num_actions: int,
        *,
        noisy: bool = False,
        num_atoms: int = 1,
        branches: int = 0,
    ) -> None:
        super().__init__()
        linear = NoisyLinear if noisy else nn.Linear
        self.shape = output_shape(num_actions, num_atoms, branches)
        self.num_atoms = num_atoms
        self.value_fc = linear(features, hidden)
        self.value = linear(hidden, num_atoms)
        self.advantage_fc = linear(features, hidden)
        self.advantage = linear(hidden, num_actions * num_atoms * max(1, branches))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Action values or logits of features ``[B, features]``."""
        value: torch.Tensor = self.value(F.relu(self.value_fc(features)))
        advantage: torch.Tensor = self.advantage(F.relu(self.advantage_fc(features)))
        if len(self.shape) > 1:
            advantage = advantage.reshape(-1, *self.shape)  # -1: len() would fix the batch on export
            atoms = (self.num_atoms,) if self.num_atoms > 1 else ()
            value = value.reshape(-1, *[1] * (len(self.shape) - len(atoms)), *atoms)
        actions = -1 if self.num_atoms == 1 else -2
        return value + advantage - advantage.mean(dim=actions, keepdim=True)


def head_layers(
    head: Head,
    features: int,
    fc: int,
    num_actions: int,
    *,
    noisy: bool = False,
    num_atoms: int = 1,
    branches: int = 0,
) -> dict[str, nn.Module]:
    """The named layers that turn ``[B, features]`` into `output_shape`, with ``fc`` hidden units (per stream).

    Raises:
        ValueError: if ``head`` is neither ``plain`` nor ``dueling``, or a number is out of range.
    """
    shape = output_shape(num_actions, num_atoms, branches)
    if head == "plain":
        linear = NoisyLinear if noisy else nn.Linear
        outputs = num_actions * num_atoms * max(1, branches)
        layers = {"fc": linear(features, fc), "fc_relu": nn.ReLU(), "head": linear(fc, outputs)}
        return layers if len(shape) == 1 else layers | {"unflatten": nn.Unflatten(1, shape)}
    if head == "dueling":
        options = {"num_atoms": num_atoms, "branches": branches}
        return {"head": DuelingHead(features, fc, num_actions, noisy=noisy, **options)}
    raise ValueError(f"no head is called {head!r}; choose one of {', '.join(get_args(Head))}")
