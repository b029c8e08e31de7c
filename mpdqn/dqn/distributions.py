"""Values as distributions over fixed numbers: what a network with K logits for each action means, and learns.

Categorical   v_min ─┼───┼───┼─ v_max    K atoms z_k on both ends and between     C51, Bellemare et al. 2017
HLGauss       v_min ├─┼─┼─┼─┤ v_max      K bins, whose centres are the numbers    Farebrother et al. 2024
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """The return as a distribution over ``num_atoms`` equidistant atoms from ``v_min`` to ``v_max`` (C51).

    Raises:
        ValueError: for fewer than 2 atoms or an empty interval.
    """

    num_atoms: int = 51
    v_min: float = -10.0
    v_max: float = 10.0

    def __post_init__(self) -> None:
        _check(self.num_atoms, self.v_min, self.v_max)

    def support(self, like: Tensor) -> Tensor:
        """The atoms z [K], in dtype and on the device of ``like``."""
        return torch.linspace(self.v_min, self.v_max, self.num_atoms, dtype=like.dtype, device=like.device)

    def project(self, points: Tensor, masses: Tensor) -> Tensor:
        """A distribution on any points, brought to the atoms (Bellemare et al. 2017, equation 7).

        Each point, first clipped to [v_min, v_max], gives its mass to the two atoms beside it, in proportion to how
        close they are. Written as equation 7 is, not as scattered sums: those have no fixed order on a GPU.

        Args:
            points: [B, N] float.
            masses: [B, N] float, each row sums to 1.

        Returns:
            [B, K] float, each row sums to 1.
        """
        atoms, step = self.support(points), (self.v_max - self.v_min) / (self.num_atoms - 1)
        distance = (points.clamp(self.v_min, self.v_max).unsqueeze(-1) - atoms).abs() / step  # [B, N, K]
        return ((1 - distance).clamp(min=0) * masses.unsqueeze(-1)).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class HLGauss:
    """The value as a histogram of ``num_bins`` equal bins from ``v_min`` to ``v_max``, learned by classification.

    A scalar target becomes the histogram of a Gaussian around it, whose σ is ``sigma_ratio`` bins wide (Farebrother et
    al. 2024, "Stop Regressing", section 3.1; Imani & White 2018). Targets are clipped to [v_min, v_max]: far outside,
    no bin has any mass.

    Raises:
        ValueError: for fewer than 2 bins, an empty interval, or a ratio that is not above 0.
    """

    num_bins: int = 51
    v_min: float = -10.0
    v_max: float = 10.0
    sigma_ratio: float = 0.75

    def __post_init__(self) -> None:
        _check(self.num_bins, self.v_min, self.v_max)
        if not self.sigma_ratio > 0:
            raise ValueError(f"sigma_ratio is {self.sigma_ratio} bins but must be above 0; the paper's is 0.75")

    @property
    def num_atoms(self) -> int:
        """K, the number of bins."""
        return self.num_bins

    @property
    def bin_width(self) -> float:
        """The width of a bin."""
        return (self.v_max - self.v_min) / self.num_bins

    def support(self, like: Tensor) -> Tensor:
        """The bins' centres [K], in dtype and on the device of ``like``."""
        half = self.bin_width / 2
        return torch.linspace(self.v_min + half, self.v_max - half, self.num_bins, dtype=like.dtype, device=like.device)

    def histogram(self, target: Tensor) -> Tensor:
        """The bins' share of a Gaussian around ``target`` [B] float, cut off at both ends: [B, K] float, sums to 1."""
        edges = torch.linspace(self.v_min, self.v_max, self.num_bins + 1, dtype=target.dtype, device=target.device)
        sigma = self.sigma_ratio * self.bin_width
        below = torch.erf((edges - target.clamp(self.v_min, self.v_max).unsqueeze(-1)) / (math.sqrt(2) * sigma))
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


Distribution = Categorical | HLGauss


def expectation(distribution: Distribution, logits: Tensor) -> Tensor:
    """Expected values […] of logits […, K] float."""
    return logits.softmax(dim=-1) @ distribution.support(logits)


def _check(count: int, v_min: float, v_max: float) -> None:
    if count < 2:
        raise ValueError(f"{count} atoms or bins are no distribution; use at least 2, such as 51")
    if not -math.inf < v_min < v_max < math.inf:
        raise ValueError(f"v_min {v_min} and v_max {v_max} are no interval; v_min must be below v_max")
