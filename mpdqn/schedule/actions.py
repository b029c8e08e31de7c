"""`Action`: one piece of work of one stage on one micro-batch, written ``2F0`` (stage, kind, micro-batch).

F forward                        R forward once more, for a backward whose graph was not kept (recomputation)
B backward, as a whole, or in two parts (zero bubble, Qi et al. 2024):
I backward for the input         W backward for the weights
T target network on next_obs     D online network on next_obs (Double DQN)
M target network on obs (Munchausen); any other letter is a no-gradient pass, too
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

FORWARD = "F"
RECOMPUTE = "R"
BACKWARD = "B"
BACKWARD_INPUT = "I"
BACKWARD_WEIGHT = "W"

GRADIENTS_OF_INPUT = (BACKWARD, BACKWARD_INPUT)
"""The kinds that hand a gradient to the stage before."""

GRADIENTS_OF_WEIGHTS = (BACKWARD, BACKWARD_WEIGHT)
"""The kinds after which a micro-batch's gradients are in the parameters, and its activations free."""

TRAINING = (FORWARD, RECOMPUTE, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)
"""The kinds of the online network's pass on obs; every other letter is a no-gradient pass."""


class Action(NamedTuple):
    """Stage ``stage`` does ``kind`` on micro-batch ``microbatch``."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The action that ``str`` wrote; ValueError if ``text`` is none."""
        match = re.fullmatch(r"(\d+)([A-Z])(\d+)", text)
        if match is None:
            raise ValueError(f"{text!r} is no action; write stage, kind and micro-batch like 2F0")
        return cls(int(match[1]), match[2], int(match[3]))
