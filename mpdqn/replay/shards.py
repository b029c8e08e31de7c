"""`VirtualShards`: replay whose samples do not depend on which process holds it.

V = 4, E = 2    shard 0      shard 1      shard 2      shard 3        environments are numbered globally
environments    0 1          2 3          4 5          6 7
a batch of 8    b₀ b₁        b₂ b₃        b₄ b₅        b₆ b₇          batch / V from every shard, in shard order
d = 2           └─ replica 0 ─────┘       └─ replica 1 ─────┘         the replicas' batches, joined, are the batch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpdqn.dqn.batch import Batch
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.replay.draw import Draw
from mpdqn.replay.gather import gather, index_of
from mpdqn.replay.rows import reserve
from mpdqn.replay.shard import Shard, ring_shape


class VirtualShards:
    """The shards that this process owns of V virtual ones.

    Args:
        observation_shape: (C, H, W) of an observation.
        num_shards: V, over all processes; fixed in the configuration.
        capacity: transitions over all V shards; each holds an equal part, rounded up to whole environments.
        envs_per_shard: E.
        seed: the run's seed.
        stack: frames in an observation.
        n_step: rewards in a return.
        discount: γ of one agent step.
        clip_rewards: whether each step's reward is clipped to [−1, 1] on sampling.
        owned: numbers of the shards held here; all V if None.
        action_shape: of one action: () for a number, (D,) for one number in each of D dimensions.
        prioritization: how transitions are prioritised; uniform replay if None.
        directory: folder for the frames, with one folder for each shard in it; in memory if None. The files stay when
            the process ends.

    Raises:
        ValueError: if a count is out of range or ``owned`` names a shard twice or one that does not exist.
        FileExistsError: if the folder of a shard holds anything already.
        OSError: if the disk has too little space for the owned shards; nothing is left behind.
    """

    def __init__(
        self,
        *,
        observation_shape: tuple[int, int, int],
        num_shards: int,
        capacity: int,
        envs_per_shard: int,
        seed: int,
        stack: int = 4,
        n_step: int = 1,
        discount: float = 0.99,
        clip_rewards: bool = True,
        owned: Sequence[int] | None = None,
        action_shape: tuple[int, ...] = (),
        prioritization: Prioritization | None = None,
        directory: Path | None = None,
    ) -> None:
        if num_shards < 1:
            raise ValueError(f"num_shards is {num_shards} but must be at least 1")
        numbers = range(num_shards) if owned is None else sorted(owned)
        if len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(num_shards)):
            raise ValueError(f"owned shards {list(numbers)} are not different numbers below num_shards = {num_shards}")
        self.num_shards = num_shards
        self.envs_per_shard = envs_per_shard
        self._prioritization = prioritization
        each = -(-capacity // num_shards)
        folders = {v: None if directory is None else directory / f"shard-{v}" for v in numbers}
        size = math.prod(ring_shape(observation_shape, each, envs_per_shard, stack, n_step))
        reserve({folder: size for folder in folders.values() if folder is not None})
        self._shards = {
            v: Shard(
                index=v,
                observation_shape=observation_shape,
                capacity=each,
                num_envs=envs_per_shard,
                seed=seed,
                stack=stack,
                n_step=n_step,
                discount=discount,
                clip_rewards=clip_rewards,
                action_shape=action_shape,
                prioritization=prioritization,
                directory=folders[v],
            )
            for v in numbers
        }

    def __len__(self) -> int:
        """How many transitions can be sampled here, over all owned shards."""
        return sum(map(len, self._shards.values()))

    def __getitem__(self, number: int) -> Shard:
        """The owned shard ``number``; ValueError if it lives elsewhere."""
        if number not in self._shards:
            raise ValueError(f"shard {number} is not among the shards {list(self.owned)} of this process")
        return self._shards[number]

    @property
    def owned(self) -> tuple[int, ...]:
        """The numbers of the shards held here, ascending."""
        return tuple(self._shards)

    @property
    def num_inserted(self) -> int:
        """Transitions that were ever appended to the owned shards."""
        return sum(shard.num_inserted for shard in self._shards.values())

    @property
    def prioritized(self) -> bool:
        """Whether TD errors that are returned change what is drawn."""
        return self._prioritization is not None

    @property
    def num_envs(self) -> int:
        """V·E, the environments of all processes together."""
        return self.num_shards * self.envs_per_shard

    def append(
        self,
        *,
        observation: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        next_observation: Tensor,
    ) -> None:
        """Store one step of every owned environment, in their order; shapes as in `Shard.append`."""
        size = self.envs_per_shard
        for place, shard in enumerate(self._shards.values()):
            rows = slice(place * size, (place + 1) * size)
            shard.append(
                observation=observation[rows],
                action=action[rows],
                reward=reward[rows],
                terminated=terminated[rows],
                truncated=truncated[rows],
                next_observation=next_observation[rows],
            )

    def interrupt(self) -> None:
        """Every owned shard's `Shard.interrupt`."""
        for shard in self._shards.values():
            shard.interrupt()

    def draw(self, batch_size: int, update: int, shards: Sequence[int] | None = None) -> Draw:
        """``batch_size``/V transitions of each of ``shards`` (default: all owned), joined in the order given.

        ``batch_size`` is the global one, whatever is owned here, and ``update`` counts the updates of the run. Frames
        are not touched: a draw takes some 50 µs and can be made where the priorities are kept up to date.

        Raises:
            ValueError: if V does not divide ``batch_size``, or a shard has too few transitions.
        """
        if batch_size < 1 or batch_size % self.num_shards:
            nearest = max(1, round(batch_size / self.num_shards)) * self.num_shards
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of the {self.num_shards} virtual shards; try {nearest}"
            )
        numbers = tuple(self._numbers(shards))
        drawn = [self[v].draw(batch_size // self.num_shards, update) for v in numbers]
        shares = [share for _, share in drawn if share is not None]
        return Draw(
            update=update,
            shards=numbers,
            index=torch.from_numpy(index_of([(self[v], rows) for v, (rows, _) in zip(numbers, drawn, strict=True)])),
            probability=torch.from_numpy(np.concatenate(shares) / self.num_shards) if shares else None,
            lowest=min(self[v].lowest for v in numbers) / self.num_shards,
        )

    def gather(self, draw: Draw, lowest: float | None = None) -> Batch:
        """The batch of ``draw``, with importance weights (lowest / P)^β; 1 without priorities.

        ``lowest`` is the smallest `Draw.lowest` of all processes that take part in the update (default: of ``draw``).
        May run in another thread while priorities change, but not while transitions are appended.
        """
        weight = None
        if draw.probability is not None:
            assert self._prioritization is not None
            ratio = (draw.lowest if lowest is None else lowest) / draw.probability.numpy()
            weight = torch.from_numpy((ratio ** self._prioritization.beta_at(draw.update)).astype(np.float32))
        index = draw.index.numpy().reshape(len(draw.shards), -1)
        return gather([(self[v], part) for v, part in zip(draw.shards, index, strict=True)], weight)

    def sample(self, batch_size: int, update: int, shards: Sequence[int] | None = None) -> Batch:
        """`draw` and `gather`, for a process that owns all shards, or for uniform replay."""
        return self.gather(self.draw(batch_size, update, shards))

    def return_td_errors(self, index: Tensor, td_errors: Tensor, shards: Sequence[int] | None = None) -> None:
        """Write |δ| [B] back to the transitions ``index`` [B] of a batch that `sample` took from the same ``shards``.

        Raises:
            ValueError: if the lengths differ or are no multiple of the number of shards.
        """
        numbers = self._numbers(shards)
        if len(index) != len(td_errors) or len(index) % len(numbers):
            raise ValueError(
                f"{len(td_errors)} TD errors for {len(index)} transitions cannot be dealt to {len(numbers)} shards"
            )
        share = len(index) // len(numbers)
        for place, number in enumerate(numbers):
            part = slice(place * share, (place + 1) * share)
            self[number].return_td_errors(index[part], td_errors[part])

    def state(self, *, frames: bool = True) -> dict[str, Tensor]:
        """The state of the owned shards as plain tensors, not copied, under ``"<shard>.<field>"``."""
        return {
            f"{v}.{name}": t for v, shard in self._shards.items() for name, t in shard.tensors(frames=frames).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy in the owned shards' part of ``state``, which may hold others' too.

        Raises:
            ValueError: if an owned shard's tensors are missing or of another shape.
        """
        for v, shard in self._shards.items():
            prefix = f"{v}."
            shard.load_tensors({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})

    def _numbers(self, shards: Sequence[int] | None) -> Sequence[int]:
        return self.owned if shards is None else shards
