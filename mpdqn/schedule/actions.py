"""`Action`: one piece of work of one stage on one micro-batch, written ``2F0`` (stage, kind, micro-batch).

F forward   B backward   T target network on next_obs   D online network on next_obs (Double DQN)
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

FORWARD = "F"
BACKWARD = "B"


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


def dependencies(action: Action, num_stages: int, passes: str) -> list[Action]:
    """The actions that must have ended before ``action`` can start, in a pipeline of ``num_stages`` stages.

    ``passes`` are the letters of the agent's no-gradient passes; the loss at the end of the last stage's forward needs
    their values.
    """
    stage, kind, i = action
    if kind == BACKWARD:
        later = [Action(stage + 1, BACKWARD, i)] if stage + 1 < num_stages else []
        return [Action(stage, FORWARD, i), *later]
    earlier = [Action(stage - 1, kind, i)] if stage > 0 else []
    if kind == FORWARD and stage == num_stages - 1:
        earlier += [Action(stage, letter, i) for letter in passes]
    return earlier
