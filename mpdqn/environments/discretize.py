"""`ActionCode`: a Gymnasium action space as the choices of a Q-network, one of A or one of A in each of D branches.

A continuous dimension is cut into evenly spaced values, its ends among them: three of them are bang-off-bang, which
costs surprisingly little in control (Seyde et al. 2021, "Is bang-bang control all you need?") and is what decoupled
Q-networks learn with (DecQN, Seyde et al. 2023, "Solving continuous control via Q-learning").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

BINS = 3


class ActionCode:
    """The choices that ``space`` offers.

    Args:
        space: Discrete, MultiDiscrete with equally many choices in each dimension, or Box with one dim and finite ends.
        bins: values in each dimension of a Box, at least 2.
        name: of the environment, for errors.

    Attributes:
        num_actions: A.
        branches: D, or 0 for one discrete action.

    Raises:
        ValueError: for any other space, or too few bins.
    """

    def __init__(self, space: spaces.Space[Any], *, bins: int = BINS, name: str) -> None:
        if bins < 2:
            raise ValueError(f"bins is {bins} but a continuous action needs at least 2 values")
        self.continuous = False
        match space:
            case spaces.Discrete():
                self.num_actions, self.branches = int(space.n), 0
                self._decode: Any = int(space.start)
            case spaces.MultiDiscrete() if space.nvec.ndim == 1 and len(set(space.nvec.tolist())) == 1:
                self.num_actions, self.branches = int(space.nvec[0]), len(space.nvec)
                self._decode = np.asarray(space.start)
            case spaces.Box() if len(space.shape) == 1 and space.is_bounded():
                self.num_actions, self.branches = bins, space.shape[0]
                self.continuous = True
                # Of the Box's own dtype, and its ends exactly, whatever is rounded between them.
                self._values = np.linspace(space.low, space.high, bins).astype(space.dtype)
                self._values[0], self._values[-1] = space.low, space.high
                self._dims = np.arange(self.branches)
            case _:
                raise ValueError(
                    f"environment {name!r} takes actions in {space}; Discrete, MultiDiscrete with equal sizes and "
                    "bounded Box of one dimension are possible: wrap it in a gymnasium.ActionWrapper that offers one"
                )

    def decode(self, action: int | NDArray[np.int64]) -> Any:
        """The simulator's action of the choice ``action``, a number or [D] of them."""
        if self.continuous:
            return self._values[action, self._dims]
        if self.branches:
            return np.asarray(action) + self._decode
        return int(action) + self._decode
