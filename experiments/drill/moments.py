"""When a run is killed: moments spread over all its frames.

frames   0 ─┬─ first checkpoint ─────┬──────────┬──────────┬─ 95 % ── the end
kills       0                    1        2          3                        one in each of n equal parts
"""

from __future__ import annotations

import random
from collections.abc import Sequence

LATEST = 0.95
"""Share of a run's frames after which it is not killed: it must not end before it is."""


def kill_moments(kills: int, frames: int, first_checkpoint: int, seed: str) -> tuple[int, ...]:
    """Return after how many frames each kill is due: a random moment in each of ``kills`` equal parts of the run.

    The first one comes before there is any checkpoint, as the run then begins anew.
    """
    draw = random.Random(seed)
    moments = [int((k + draw.random()) / kills * LATEST * frames) for k in range(kills)]
    return (min(moments[0], draw.randrange(first_checkpoint // 2)), *moments[1:])


def flag(flags: Sequence[str], name: str) -> int:
    """Return the number that follows ``name`` in ``flags``."""
    return int(flags[flags.index(name) + 1])
