"""When batches are drawn: from what replay holds `lookahead + prefetch` updates before they are learned from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpdqn.dqn.batch import Batch
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.learner import LearnStep
from mpdqn.replay import Prefetcher, VirtualShards
from mpdqn.train.batches import BatchQueue

CPU = torch.device("cpu")


def make_shards() -> VirtualShards:
    return VirtualShards(
        observation_shape=(1, 3, 3),
        num_shards=2,
        capacity=400,
        envs_per_shard=2,
        seed=1,
        stack=1,
        prioritization=Prioritization(alpha=1.0),
    )


def append(shards: VirtualShards, value: int) -> None:
    frame = torch.full((4, 1, 3, 3), value, dtype=torch.uint8)
    flags = torch.zeros(4, dtype=torch.bool)
    shards.append(
        observation=frame,
        action=torch.zeros(4, dtype=torch.int64),
        reward=torch.zeros(4),
        terminated=flags,
        truncated=flags,
        next_observation=frame,
    )


def step_of(update: int, batch: Batch) -> LearnStep:
    """Errors that differ from update to update, so that priorities say when a draw was made."""
    zero = torch.zeros(())
    errors = (batch.index % 7 + update).float()
    return LearnStep(update=update, loss=zero, grad_norm=zero, td_errors=errors, late_passes=0, bytes_sent=0)


def run(lookahead: int, prefetch: int) -> list[Batch]:
    """What a queue gives in eight rounds of two updates."""
    shards, seen = make_shards(), []
    for value in range(10):
        append(shards, value)
    with Prefetcher(CPU, torch.float32) as prefetcher:
        queue = BatchQueue(
            shards,
            batch_size=8,
            lookahead=lookahead,
            prefetch=prefetch,
            prefetcher=prefetcher,
            agree=lambda lowest: lowest,
        )
        update = 0
        for r in range(8):
            queue.settle()
            append(shards, 10 + r)
            for _ in range(2):
                batch, upcoming = queue.batches(update)
                assert (upcoming is not None) == bool(lookahead)
                queue.learned(batch, step_of(update, batch))
                seen.append(batch)
                update += 1
    return seen


def expected(early: int) -> list[Batch]:
    """The same by the definition, one thing after the other."""
    shards, drawn = make_shards(), []
    for value in range(10):
        append(shards, value)
    update = 0
    for r in range(8):
        append(shards, 10 + r)
        for _ in range(2):
            while len(drawn) <= update + early:
                drawn.append(shards.sample(8, len(drawn)))
            step = step_of(update, drawn[update])
            assert step.td_errors is not None
            shards.return_td_errors(drawn[update].index, step.td_errors)
            update += 1
    return drawn[:update]


@pytest.mark.parametrize(("lookahead", "prefetch"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_batch_is_drawn_when_the_settings_say(lookahead: int, prefetch: int) -> None:
    found, wanted = run(lookahead, prefetch), expected(lookahead + prefetch)
    for a, b in zip(found, wanted, strict=True):
        for name in ("index", "obs", "next_obs", "weight", "reward", "action"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_the_settings_make_a_difference() -> None:
    """Else the test above would hold for a queue that draws at any time."""
    kinds: dict[int, Any] = {early: [batch.index.tolist() for batch in expected(early)] for early in (0, 1, 2)}
    assert kinds[0] != kinds[1] != kinds[2] != kinds[0]


def test_what_making_a_batch_raises_is_raised_at_the_next_one() -> None:
    shards = make_shards()
    with Prefetcher(CPU, torch.float32) as prefetcher:
        queue = BatchQueue(
            shards, batch_size=8, lookahead=0, prefetch=0, prefetcher=prefetcher, agree=lambda lowest: lowest
        )
        with pytest.raises(ValueError, match="collect first"):
            queue.batches(0)
