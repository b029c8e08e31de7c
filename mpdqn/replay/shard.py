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
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import TensorStorage

from mpdqn.dqn.batch import Batch
from mpdqn.randomness import keyed_seed


class Shard:
    """A ring of single frames for the E environments of one virtual shard, sampled as stacks and n-step returns.

    The rows live in one TorchRL storage. A row costs one frame (7,056 bytes for Atari) and 23 bytes for its fields.
    Rewards are stored as the environment gave them.

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
    ) -> None:
        for name, count in (("capacity", capacity), ("num_envs", num_envs), ("stack", stack), ("n_step", n_step)):
            if count < 1:
                raise ValueError(f"{name} is {count} but must be at least 1")
        channels, height, width = observation_shape
        if channels % stack:
            raise ValueError(f"observations have {channels} channels, which is not a multiple of stack = {stack}")
        self.index = index
        self.num_envs = num_envs
        self.capacity = num_envs * math.ceil(capacity / num_envs)
        self._seed, self._stack, self._n_step, self._clip_rewards = seed, stack, n_step, clip_rewards
        # With the rows that cannot be sampled at either end of the ring, `capacity` can be.
        self._length = self.capacity // num_envs + (stack - 1) + n_step
        rows = num_envs * self._length
        # Zeros are mapped, not touched: memory fills as the ring does.
        self._rows: dict[str, Tensor] = {
            "frame": torch.zeros(rows, channels // stack, height, width, dtype=torch.uint8),
            "action": torch.zeros(rows, dtype=torch.int64),
            "reward": torch.zeros(rows, dtype=torch.float32),
            "terminated": torch.zeros(rows, dtype=torch.bool),
            "truncated": torch.zeros(rows, dtype=torch.bool),
            "step": torch.zeros(rows, dtype=torch.int32),
            "td_error": torch.full((rows,), torch.nan),  # |δ|, unknown until it is returned
            "sampleable": torch.zeros(rows, dtype=torch.bool),
        }
        self._storage: Any = TensorStorage(TensorDict(self._rows, batch_size=[rows]))
        self._written = torch.zeros(num_envs, dtype=torch.int64)  # rows ever written: the position of the next one
        self._step = torch.zeros(num_envs, dtype=torch.int64)  # steps since the episode began
        # γ⁰ … γⁿ by the definition, so that a reference can be equal and not merely close.
        self._discounts = torch.tensor([discount**k for k in range(n_step + 1)], dtype=torch.float64)

    def __len__(self) -> int:
        """How many transitions can be sampled now."""
        return int(torch.count_nonzero(self._rows["sampleable"]))

    @property
    def num_bytes(self) -> int:
        """Bytes of the ring when it is full."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

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

        ``observation`` and ``next_observation`` [E, C, H, W] uint8; ``action`` [E]; ``reward`` [E], not clipped;
        ``terminated`` and ``truncated`` [E] bool. ``next_observation`` is the true one: of an episode that ended,
        its last, not the first of the next episode.
        """
        everyone = torch.arange(self.num_envs)
        frame = self._newest_frame(observation)
        self._write(
            everyone, frame, action=action, reward=reward, terminated=terminated, truncated=truncated, last=False
        )
        ended = (terminated | truncated).nonzero().squeeze(1)
        if len(ended):
            frame, nothing = self._newest_frame(next_observation[ended]), torch.zeros(len(ended))
            self._write(ended, frame, action=nothing, reward=nothing, terminated=nothing, truncated=nothing, last=True)
            self._step[ended] = 0

    def interrupt(self) -> None:
        """Leave the running episodes as they are; what is appended next begins new ones.

        For environments that were replaced or reset from outside. The last n transitions of an episode that was left
        so are never sampled, as their returns are unknown.
        """
        self._step.zero_()

    def sample(self, count: int, update: int) -> Batch:
        """``count`` transitions, uniformly and with replacement, from the stream of (seed, shard, ``update``).

        The same call on the same content gives the same batch. Returns are float32, ``index`` names a transition for
        `return_td_errors` even after the ring has moved on.

        Raises:
            ValueError: if fewer than ``count`` transitions can be sampled.
        """
        available = len(self)
        if available < count or available == 0:
            raise ValueError(
                f"{count} transitions are asked of shard {self.index} but {available} can be sampled; collect first"
            )
        generator = torch.Generator().manual_seed(keyed_seed("sampling", self._seed, self.index, update))
        kept = self._written.clamp(max=self._length)
        ends = kept.cumsum(0)
        chosen: list[Tensor] = []
        missing = count
        while missing:  # a draw is refused with the small share of rows that cannot be sampled
            draw = torch.randint(int(ends[-1]), (count,), generator=generator)
            env = torch.searchsorted(ends, draw, right=True)
            index = (self._written[env] - ends[env] + draw) * self.num_envs + env
            index = index[self._rows["sampleable"][self._row(*self._env_and_position(index))]][:missing]
            chosen.append(index)
            missing -= len(index)
        return self.gather(torch.cat(chosen))

    def gather(self, index: Tensor) -> Batch:
        """The transitions that ``index`` [B] int64 names, rebuilt: see `sample`."""
        env, position = self._env_and_position(index)
        first = self._row(env, position)
        rows = self._row(env[:, None], position[:, None] + torch.arange(self._n_step))
        terminated, truncated = self._rows["terminated"][rows], self._rows["truncated"][rows]
        done = (terminated | truncated).long()
        taken = done.cumsum(1) - done == 0  # [B, n]: step i was taken, as the episode did not end before it
        num_steps = taken.sum(1)
        reward = self._rows["reward"][rows].double()
        if self._clip_rewards:
            reward = reward.clamp(-1.0, 1.0)
        returns = torch.zeros(len(index), dtype=torch.float64)
        for i in range(self._n_step):
            returns += self._discounts[i] * reward[:, i] * taken[:, i]
        survived = ~(terminated & taken).any(1)
        step = self._rows["step"][first].long()
        return Batch(
            obs=self._stacks(env, position, step),
            next_obs=self._stacks(env, position + num_steps, step + num_steps),
            action=self._rows["action"][first],
            reward=returns.float(),
            discount=(self._discounts[num_steps] * survived).float(),
            weight=torch.ones(len(index)),
            index=index,
        )

    def return_td_errors(self, index: Tensor, td_errors: Tensor) -> None:
        """Write |δ| [B] to the transitions ``index`` [B]; those overwritten since they were sampled are left out."""
        env, position = self._env_and_position(index)
        kept = position >= self._written[env] - self._length
        self._rows["td_error"][self._row(env, position)[kept]] = td_errors.detach().abs().cpu().float()[kept]

    def tensors(self) -> dict[str, Tensor]:
        """The whole state as plain tensors, not copied; `load_tensors` of an equally built shard takes them."""
        return self._rows | {"written": self._written, "episode_step": self._step}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy in the state of a shard with the same sizes.

        Raises:
            ValueError: if a tensor is missing, unknown or of another shape.
        """
        own = self.tensors()
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

    def _write(self, env: Tensor, frame: Tensor, *, last: bool, **fields: Tensor) -> None:
        """Put one row at the head of each ring in ``env``, and settle which rows can be sampled."""
        position, step = self._written[env], self._step[env]
        rows: dict[str, Tensor] = {"frame": frame, "step": step, **fields}
        rows["td_error"] = torch.full((len(env),), torch.nan)
        rows["sampleable"] = torch.zeros(len(env), dtype=torch.bool)
        typed = {name: tensor.to(self._rows[name].dtype) for name, tensor in rows.items()}
        self._storage.set(self._row(env, position), TensorDict(typed, batch_size=[len(env)]))
        broken = position[:, None] + torch.arange(1, self._stack)
        self._rows["sampleable"][self._row(env[:, None], broken)] = False
        # This row completes the return of the transition n steps before it; an episode's last row completes all that
        # are still open, as they get no further steps.
        for steps in range(1 if last else self._n_step, self._n_step + 1):
            old = step >= steps
            self._rows["sampleable"][self._row(env, position - steps)[old]] = True
        self._written[env] += 1
        self._step[env] += 1

    def _stacks(self, env: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """The observations [B, C, H, W] whose newest frames are at ``position``, ``step`` steps into their episodes."""
        back = torch.arange(1 - self._stack, 1)
        rows = self._row(env[:, None], position[:, None] + back).flatten()
        frames = self._rows["frame"].index_select(0, rows)  # whole frames at a time, unlike `[rows]`
        stacks = frames.reshape(len(env), self._stack, *frames.shape[1:])
        stacks[step[:, None] + back < 0] = 0
        return stacks.reshape(len(env), -1, *frames.shape[2:])

    def _newest_frame(self, observation: Tensor) -> Tensor:
        return observation[:, -(observation.shape[1] // self._stack) :]

    def _row(self, env: Tensor, position: Tensor) -> Tensor:
        return env * self._length + position % self._length

    def _env_and_position(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return index % self.num_envs, index // self.num_envs
