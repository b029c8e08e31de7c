"""`Shard`: the transitions of E environments, each frame stored once.

Each environment has a ring of L rows. A row is a frame, what was done in it and what came of it; the next row is the
next frame. An ended episode has one row more than it has actions, because its last observation is needed too:

    position   0    1    2    3   | 4    5    6  …     row of position q: q mod L
    frame      x₀   x₁   x₂   x₃  | y₀   y₁   y₂       the newest frame of each observation
    step       0    1    2    3   | 0    1    2        0 begins an episode; frames before it show as zeros
    action     a₀   a₁   a₂   ·   | b₀   b₁   ·        · nothing was done in the last observation …
    done       0    0    1    ·   | 0    0    ·          … which is the row after `terminated` or `truncated`
    sampleable 1    1    1    0   | 1    0    0        n = 1: y₁ waits for y₂'s row

The write head overwrites the oldest row. The stack − 1 rows after it have lost a frame of their stack and are no longer
sampleable; the n rows behind it are not sampleable yet, unless their episode ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import TensorStorage

from mpdqn.dqn.batch import Batch
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.replay.gather import gather, index_of
from mpdqn.replay.rows import field_rows, frame_rows
from mpdqn.replay.sampling import Rows, make_sampler

FRAME = "frame"
"""The name of the frames among a shard's tensors."""


class Shard:
    """A ring of single frames for the E environments of one virtual shard, sampled as stacks and n-step returns.

    The rows live in one TorchRL storage. A row costs one frame (7,056 bytes for Atari) and 25 bytes for its fields;
    with priorities 7 bytes more, and 32 to 64 bytes for the two trees that are drawn with. Rewards are stored as the
    environment gave them.

    Args:
        index: the shard's number among all virtual shards; it names the shard's random stream.
        observation_shape: (C, H, W) of an observation; C is ``stack`` times the channels of a frame.
        capacity: transitions, over all E environments; so many can be sampled if no episode ends among them, and one
            fewer for each that does. A multiple of E is used, rounded up.
        num_envs: E.
        seed: the run's seed.
        stack: frames in an observation.
        n_step: rewards in a return.
        discount: γ of one agent step.
        clip_rewards: whether each step's reward is clipped to [−1, 1] before the return is summed (Mnih et al. 2015).
        action_shape: of one action: () for a number, (D,) for one number in each of D dimensions.
        prioritization: how transitions are prioritised; uniform replay if None.
        directory: folder whose file holds the frames, made by `mpdqn.replay.rows.reserve`; in memory if None.

    Raises:
        ValueError: if a count is below 1, or ``stack`` does not divide C.
    """

    def __init__(
        self,
        *,
        index: int,
        observation_shape: tuple[int, int, int],
        capacity: int,
        num_envs: int,
        seed: int,
        stack: int = 4,
        n_step: int = 1,
        discount: float = 0.99,
        clip_rewards: bool = True,
        action_shape: tuple[int, ...] = (),
        prioritization: Prioritization | None = None,
        directory: Path | None = None,
    ) -> None:
        frames = ring_shape(observation_shape, capacity, num_envs, stack, n_step)
        rows, self.frame_shape = frames[0], frames[1:]
        self.index, self.num_envs, self.stack, self.n_step = index, num_envs, stack, n_step
        self.capacity = num_envs * math.ceil(capacity / num_envs)
        self.clip_rewards, self.action_shape = clip_rewards, action_shape
        # γ⁰ … γⁿ by the definition, so that a reference can be equal and not merely close.
        self.discounts = np.array([discount**k for k in range(n_step + 1)])
        self._seed = seed
        self.length = rows // num_envs  # L
        frame = frame_rows(frames, directory)
        self.records, fields = field_rows(rows, action_shape)
        self._fields = {FRAME: frame} | fields
        self._fields["td_error"].fill_(torch.nan)  # |δ|, unknown until it is returned
        # "Compilable" has nothing to do with torch.compile here: otherwise the storage makes three semaphores, to be
        # shared between processes, which a killed rank leaves behind in the system.
        self.storage = TensorStorage(TensorDict(self._fields, batch_size=[rows]), compilable=True)
        self._sampler = make_sampler(num_envs, self.length, prioritization)
        self._cursors = {
            "written": torch.zeros(num_envs, dtype=torch.int64),  # rows ever written: the position of the next one
            "episode_step": torch.zeros(num_envs, dtype=torch.int64),  # steps since the episode began
            "num_inserted": torch.zeros(1, dtype=torch.int64),
        }
        # Views of the same memory: a step of few environments is many small operations, and numpy's start sooner.
        self.frames = frame.numpy()
        self.written, self._step, self._inserted = (tensor.numpy() for tensor in self._cursors.values())
        self._everyone = np.arange(num_envs)

    def __len__(self) -> int:
        """How many transitions can be sampled now."""
        return self._sampler.count

    @property
    def num_inserted(self) -> int:
        """Transitions ever appended."""
        return int(self._inserted[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of the ring when it is full, with all that belongs to it."""
        cursors = sum(tensor.nbytes for tensor in self._cursors.values())
        return self.frames.nbytes + self.records.nbytes + self._sampler.num_bytes + cursors

    @property
    def lowest(self) -> float:
        """The smallest share of the shard's mass that any transition has; infinite without priorities."""
        return self._sampler.lowest

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
        """Store one step of every environment; only the newest frame of each observation is kept.

        ``observation`` and ``next_observation`` [E, C, H, W] uint8; ``action`` [E] or [E, D]; ``reward`` [E], not
        clipped; ``terminated`` and ``truncated`` [E] bool. ``next_observation`` is the true one: of an episode that
        ended, its last, not the first of the next episode. All lie on the CPU.

        Raises:
            ValueError: if actions have another shape than ``action_shape`` says.
        """
        if action.shape != (self.num_envs, *self.action_shape):
            raise ValueError(
                f"actions have shape {tuple(action.shape)} but {self.num_envs} environments and action_shape "
                f"{self.action_shape} make {(self.num_envs, *self.action_shape)}"
            )
        env = self._everyone
        row = self._begin_rows(env, observation.numpy())
        records = self.records
        records["action"][row] = action.numpy()
        records["reward"][row] = reward.numpy()
        records["terminated"][row] = ended_by_rule = terminated.numpy()
        records["truncated"][row] = cut_short = truncated.numpy()
        # This row completes the return of the transition n steps before it.
        self._complete(env, self.n_step)
        self._end_rows(env)
        self._inserted += self.num_envs
        ended = (ended_by_rule | cut_short).nonzero()[0]
        if len(ended):
            row = self._begin_rows(ended, next_observation.numpy()[ended])
            for name in ("action", "reward", "terminated", "truncated"):
                self.records[name][row] = 0
            # An episode's last row completes all transitions that are still open, as they get no further steps.
            for steps in range(1, self.n_step + 1):
                self._complete(ended, steps)
            self._end_rows(ended)
            self._step[ended] = 0

    def interrupt(self) -> None:
        """Leave the running episodes as they are; what is appended next begins new ones.

        For environments that were replaced or reset from outside. The last n transitions of an episode that was left
        so are never sampled, as their returns are unknown.
        """
        self._step.fill(0)

    def draw(self, count: int, update: int) -> tuple[Rows, NDArray[np.float64] | None]:
        """Rows [count] of transitions, with replacement, and each one's share of the shard's mass (None: uniform).

        They come from the stream of (seed, shard, ``update``): the same call on the same content gives the same draw.

        Raises:
            ValueError: if fewer than ``count`` transitions can be sampled.
        """
        available = self._sampler.count
        if available < max(count, 1):
            raise ValueError(
                f"{count} transitions are asked of shard {self.index} but {available} can be sampled; collect first"
            )
        return self._sampler.draw(count, ("sampling", self._seed, self.index, update))

    def sample(self, count: int, update: int) -> Batch:
        """`draw` and `gather`.

        Returns are float32, ``index`` names a transition for `return_td_errors` even after the ring has moved on.
        """
        return self.gather(torch.from_numpy(index_of([(self, self.draw(count, update)[0])])))

    def gather(self, index: Tensor) -> Batch:
        """The transitions that ``index`` [B] int64 names, with weights of 1: see `mpdqn.replay.gather`."""
        return gather([(self, index.numpy())])

    def return_td_errors(self, index: Tensor, td_errors: Tensor) -> None:
        """Write |δ| [B] to the transitions ``index`` [B]; those overwritten since they were sampled are left out.

        Raises:
            ValueError: if there are priorities and an error is not finite.
        """
        indices, magnitudes = index.cpu().numpy(), td_errors.detach().abs().double().cpu().numpy()
        env, position = indices % self.num_envs, indices // self.num_envs
        kept = position >= self.written[env] - self.length
        row, magnitudes = self._row(env, position)[kept], magnitudes[kept]
        self._sampler.update(row, magnitudes)
        self.records["td_error"][row] = magnitudes

    def tensors(self, *, frames: bool = True) -> dict[str, Tensor]:
        """The whole state as plain tensors, not copied; `load_tensors` of an equally built shard takes them.

        Without ``frames`` what else there is, which is small and changes, where frames are large and never do.
        """
        fields = {name: t for name, t in self._fields.items() if frames or name != FRAME}
        return fields | self._cursors | self._sampler.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy in the state of a shard with the same sizes, with or without its frames.

        Raises:
            ValueError: if a tensor is missing, unknown or of another shape.
        """
        own = self.tensors(frames=FRAME in tensors)
        if own.keys() != tensors.keys():
            raise ValueError(f"shard {self.index} holds {sorted(own)} but was given {sorted(tensors)}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} of shard {self.index} has shape {tuple(tensor.shape)} but was given "
                    f"{tuple(tensors[name].shape)}; capacity, num_envs and n_step must agree"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self._sampler.reload()

    def _begin_rows(self, env: NDArray[np.int64], observation: NDArray[np.uint8]) -> Rows:
        """Put the newest frame of each observation at the heads of the rings in ``env``; the rows they take."""
        position = self.written[env]
        row = self._row(env, position)
        self.frames[row] = observation[:, -self.frame_shape[0] :]
        self.records["step"][row] = self._step[env]
        self.records["td_error"][row] = np.nan
        # The row stack − 1 further on loses a frame of its stack; those in between lost one before.
        self._sampler.leave(self._row(env, position + self.stack - 1))
        return row

    def _complete(self, env: NDArray[np.int64], steps: int) -> None:
        """Let the transitions be drawn that began ``steps`` before the head, if their episode is as old as that."""
        env = env[self._step[env] >= steps]
        self._sampler.enter(self._row(env, self.written[env] - steps))

    def _end_rows(self, env: NDArray[np.int64]) -> None:
        self.written[env] += 1
        self._step[env] += 1

    def _row(self, env: NDArray[np.int64], position: NDArray[np.int64]) -> Rows:
        rows: Rows = env * self.length + position % self.length
        return rows


def ring_shape(
    observation_shape: Sequence[int], capacity: int, num_envs: int, stack: int, n_step: int
) -> tuple[int, int, int, int]:
    """[rows, c, H, W] of the frames of a shard: see `Shard`, also for the errors."""
    for name, count in (("capacity", capacity), ("num_envs", num_envs), ("stack", stack), ("n_step", n_step)):
        if count < 1:
            raise ValueError(f"{name} is {count} but must be at least 1")
    channels, height, width = observation_shape
    if channels % stack:
        raise ValueError(f"observations have {channels} channels, which is not a multiple of stack = {stack}")
    # With the rows that cannot be sampled at either end of the ring, `capacity` can be.
    length = math.ceil(capacity / num_envs) + (stack - 1) + n_step
    return num_envs * length, channels // stack, height, width
