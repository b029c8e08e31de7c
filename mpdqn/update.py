"""How an update is made, and what it did: the settings of a `mpdqn.learner.Learner`, its optimizer, its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How an update is made.

    The defaults are Dopamine's DQN with Adam on Atari (Castro et al. 2018; Obando-Ceron & Castro 2021).
    ``target_period`` counts updates, ``target_tau`` is τ of target ← τ·online + (1 − τ)·target; ``max_grad_norm``
    bounds the norm over *all* stages (inf: no clipping). ``lookahead`` (0 or 1) is how many updates early a batch is
    sampled, with the same meaning in every layout; ``accumulation`` how many parts of the batch run through the
    pipeline one after the other before the weights change. ``seed`` names the noise of noisy networks.

    Raises:
        ValueError: for a value that cannot be meant.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 6.25e-5
    adam_eps: float = 1.5e-4
    target_period: int = 2_000
    target_tau: float = 1.0
    max_grad_norm: float = 10.0
    lookahead: int = 0
    accumulation: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose adam or sgd")
        for name in ("learning_rate", "adam_eps", "target_period", "target_tau", "max_grad_norm", "accumulation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be above 0")
        if self.target_tau > 1:
            raise ValueError(f"target_tau is {self.target_tau} but must be at most 1, which copies")
        if self.lookahead not in (0, 1):
            raise ValueError(f"lookahead is {self.lookahead} but must be 0 or 1")


@dataclass(frozen=True, kw_only=True)
class LearnStep:
    """What one update did.

    ``loss`` and ``grad_norm`` (before clipping) are scalars of the whole batch, the same on every rank; a NaN or inf in
    any of its rows shows in ``loss``. ``td_errors`` [b] are those of this replica's part of the batch (KL divergences
    where the agent learns a distribution), on the rank of its first stage; None elsewhere. ``late_passes``
    counts the no-gradient passes that the schedule would have run in its gaps one update earlier but that ran on their
    own, because the target had changed since or nothing was announced. ``bytes_sent`` counts what this rank sent.
    """

    update: int
    loss: Tensor
    grad_norm: Tensor
    td_errors: Tensor | None
    late_passes: int
    bytes_sent: int


def make_optimizer(parameters: list[nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over ``parameters``."""
    # The fused kernels exist for CPU and CUDA and compute the same update in one sweep.
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, fused=True)
    return torch.optim.Adam(parameters, lr=config.learning_rate, eps=config.adam_eps, fused=True)
