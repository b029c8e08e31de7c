"""The naive replay: whole stacks in Python lists, n-step returns by their definition. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Step:
    obs: Tensor
    action: int
    reward: float
    terminated: bool
    truncated: bool
    next_obs: Tensor
    position: int


@dataclass
class NaiveReplay:
    """E environments' episodes, as lists of steps; positions count an ended episode's last observation too."""

    num_envs: int
    episodes: list[list[list[Step]]] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.episodes = [[[]] for _ in range(self.num_envs)]
        self.written = [0] * self.num_envs

    def append(self, **step: Tensor) -> None:
        for e in range(self.num_envs):
            self.episodes[e][-1].append(
                Step(
                    obs=step["observation"][e],
                    action=int(step["action"][e]),
                    reward=float(step["reward"][e]),
                    terminated=bool(step["terminated"][e]),
                    truncated=bool(step["truncated"][e]),
                    next_obs=step["next_observation"][e],
                    position=self.written[e],
                )
            )
            self.written[e] += 1
            if step["terminated"][e] or step["truncated"][e]:
                self.written[e] += 1
                self.episodes[e].append([])

    def interrupt(self) -> None:
        for e in range(self.num_envs):
            self.episodes[e].append([])

    def transitions(
        self, *, length: int, stack: int, n: int, discount: float, clip: bool
    ) -> dict[int, tuple[Tensor, Tensor, int, np.float32, np.float32]]:
        """index -> (obs, next_obs, action, return, discount) of all that a ring of ``length`` rows can still give."""
        found = {}
        for e in range(self.num_envs):
            for episode in self.episodes[e]:
                for t, first in enumerate(episode):
                    taken = episode[t : t + n]
                    over = taken[-1].terminated or taken[-1].truncated
                    # An interrupted episode has no more rows: those after it are another's.
                    next_is_stored = over or t + n < len(episode)
                    stack_is_stored = first.position - (stack - 1) >= self.written[e] - length
                    if not (next_is_stored and stack_is_stored):
                        continue
                    total = 0.0
                    for k, step in enumerate(taken):
                        total += discount**k * (max(-1.0, min(1.0, step.reward)) if clip else step.reward)
                    bootstrap = 0.0 if taken[-1].terminated else discount ** len(taken)
                    found[first.position * self.num_envs + e] = (
                        first.obs,
                        taken[-1].next_obs,
                        first.action,
                        np.float32(total),
                        np.float32(bootstrap),
                    )
        return found


@dataclass
class NaivePriorities:
    """index -> p of every transition that can be drawn; new ones get the largest so far."""

    alpha: float
    epsilon: float
    largest: float = 1.0
    priority: dict[int, float] = field(default_factory=dict)

    def settle(self, sampleable: Iterable[int]) -> None:
        self.priority = {i: self.priority.get(i, self.largest) for i in sampleable}

    def return_td_error(self, index: int, error: float) -> None:
        if index in self.priority:
            self.priority[index] = (abs(error) + self.epsilon) ** self.alpha
            self.largest = max(self.largest, self.priority[index])


def assert_same(shard, naive: NaiveReplay, *, stack: int, n: int, discount: float, clip: bool) -> int:
    """Every sampleable transition of ``shard`` equals the reference's, and neither has one that the other lacks."""
    length = shard.capacity // shard.num_envs + stack - 1 + n
    expected = naive.transitions(length=length, stack=stack, n=n, discount=discount, clip=clip)
    assert len(shard) == len(expected)
    if not expected:
        return 0
    index = torch.tensor(sorted(expected))
    # What can be sampled is exactly what the reference lists: no index outside of it is ever drawn.
    drawn = shard.sample(len(expected), update=0).index
    assert set(drawn.tolist()) <= set(expected)
    batch = shard.gather(index)
    want = [expected[i] for i in index.tolist()]
    assert torch.equal(batch.obs, torch.stack([w[0] for w in want]))
    assert torch.equal(batch.next_obs, torch.stack([w[1] for w in want]))
    assert batch.action.tolist() == [w[2] for w in want]
    assert batch.reward.numpy().tolist() == [float(w[3]) for w in want]
    assert batch.discount.numpy().tolist() == [float(w[4]) for w in want]
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.weight, torch.ones(len(index)))
    return len(expected)
