"""`BatchedEnvironment`: what the environments of every field share as TorchRL environments.

It counts episodes and steps, names each episode's seed, and resets by mask; a field's own class only begins episodes
and takes steps. `padded` and `pushed` keep stacks of frames for simulators that give one frame at a time:

    reset            stack  [ 0  0  0  x₀]   a stack starts padded with zero frames
    step 1                  [ 0  0  x₀ x₁]
    step 2                  [ 0  x₀ x₁ x₂]
    step 3                  [x₀ x₁ x₂ x₃]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from mpdqn.environments.spec import EnvironmentSpec
from mpdqn.randomness import keyed_seed

Outcome = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]
"""Of one step of N environments: observations [N, C, H, W], rewards, terminated and truncated, [N] each."""


class BatchedEnvironment(EnvBase):  # type: ignore[misc]
    """N environments of one kind; ``batch_size`` is [N].

    Keys: ``observation`` uint8 [N, C, H, W], the newest frame last; ``episode`` int64 [N], how many episodes this
    environment finished or left before; ``step`` int64 [N], agent steps since the episode began; ``action`` int64 [N],
    or [N, D] with D branches; ``reward`` float32 [N, 1], the simulator's own, not clipped; ``terminated`` (it is over),
    ``truncated`` (a limit cut it) and ``done`` (either) bool [N, 1].

    Episode k of environment e is a function of ``keyed_seed("environment", seed, e, k)`` and the actions alone: neither
    the other environments nor the processes they live in matter. Resetting an environment that took no step since its
    last reset, or since `load_state`, leaves it as it is.

    Args:
        spec: of one of the environments.
        num_envs: N.
        seed: the run's seed.
        first_index: global index of the first of the N environments.

    Attributes:
        indices: the global indices of the N environments.
        num_restarts: workers that died and were replaced.

    Raises:
        ValueError: if a count is out of range.
    """

    num_restarts: int = 0
    _over: NDArray[np.bool_]
    _untouched: NDArray[np.bool_]
    _played: NDArray[np.int64]

    def __init__(self, spec: EnvironmentSpec, *, num_envs: int, seed: int, first_index: int = 0) -> None:
        if num_envs < 1 or first_index < 0:
            raise ValueError(f"num_envs is {num_envs} (at least 1) and first_index {first_index} (at least 0)")
        super().__init__(device=torch.device("cpu"), batch_size=torch.Size([num_envs]))
        self.spec = spec
        self.indices = range(first_index, first_index + num_envs)
        self.observation_shape = spec.observation_shape
        self.num_actions = spec.num_actions
        self.frames_per_action = spec.frames_per_action
        self._set_seed(seed)
        n = num_envs
        flag = Binary(1, dtype=torch.bool).expand(n, 1)
        self.observation_spec = Composite(
            observation=Bounded(0, 255, shape=(n, *spec.observation_shape), dtype=torch.uint8),
            episode=Unbounded(shape=(n,), dtype=torch.int64),
            step=Unbounded(shape=(n,), dtype=torch.int64),
            shape=(n,),
        )
        self.action_spec = Categorical(spec.num_actions, shape=(n, *spec.action_shape), dtype=torch.int64)
        self.reward_spec = Unbounded(shape=(n, 1), dtype=torch.float32)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,))

    def _begin(self, which: NDArray[np.int64], seeds: list[int]) -> NDArray[np.uint8]:
        """Begin episodes in the environments at the positions ``which``; the observations of all N, in new memory."""
        raise NotImplementedError

    def _advance(self, action: NDArray[np.int64]) -> Outcome:
        """Step all N environments, none of which is over, with ``action`` [N] or [N, D]; observations in new memory."""
        raise NotImplementedError

    def _play_again(self, episodes: Mapping[int, tuple[int, NDArray[np.int64]]]) -> dict[int, NDArray[np.uint8]]:
        """Bring the environments at these positions to where an episode's seed and actions [T] or [T, D] lead.

        Returns the newest frame [c, H, W] of each.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Where the N environments are: what `load_state` of an equal one takes. None of them may be over.

        ``observation`` uint8 [N, C, H, W]; ``episode`` and ``step`` int64 [N]; ``actions`` int64 [Σ step, …], those of
        the running episodes, one environment's after the other's. No simulator needs to save its own state: an
        episode is a function of its seed and its actions.
        """
        actions = self._played[np.arange(self._played.shape[1]) < self._step_in_episode[:, None]]
        return {name: t.clone() for name, t in self._observed().items()} | {"actions": torch.from_numpy(actions)}

    def load_state(self, state: Mapping[str, Tensor], begin_anew: bool = False) -> None:
        """Go to where `state` was, by playing the running episodes again.

        With ``begin_anew`` the next reset leaves those episodes and begins the ones after them.

        Raises:
            ValueError: if an episode comes out differently, as in another version of its simulator.
        """
        step = state["step"].numpy()
        self._episode = state["episode"].numpy().copy()
        self._untouched[:] = not begin_anew
        if begin_anew:
            self._over[:] = True
            return
        parts = np.split(state["actions"].numpy(), np.cumsum(step)[:-1])
        seeds = [self._episode_seed(i, int(k)) for i, k in enumerate(self._episode)]
        observation = state["observation"].numpy().copy()
        channels = observation.shape[1] // self.spec.stack
        frames = self._play_again({i: (seeds[i], part) for i, part in enumerate(parts)})
        for i, frame in frames.items():
            if not np.array_equal(frame, observation[i, -channels:]):
                raise ValueError(
                    f"environment {self.indices[i]} of {self.spec.name!r} shows another frame after the same {step[i]} "
                    f"actions of episode {self._episode[i]}; it is another version of the simulator than before"
                )
        self._step_in_episode = step.copy()
        self._over = np.zeros(len(step), dtype=bool)
        self._make_room(int(step.max()))
        for i, part in enumerate(parts):
            self._played[i, : len(part)] = part
        self._show(observation)

    def _show(self, observation: NDArray[np.uint8]) -> None:
        """Take ``observation`` [N, C, H, W] as what was observed last."""
        self._observation = observation

    def _make_room(self, steps: int) -> None:
        """Have room for the actions of ``steps`` steps of every episode."""
        n, room, *rest = self._played.shape
        if steps > room:
            more = np.zeros((n, max(steps, 2 * room) - room, *rest), np.int64)
            self._played = np.concatenate([self._played, more], axis=1)

    def _set_seed(self, seed: int | None) -> None:
        """Start over: the next reset begins episode 0 of ``seed`` everywhere."""
        if seed is None:
            raise ValueError("an environment of mpdqn is always seeded; pass an integer, not None")
        n = len(self.indices)
        self._seed = seed
        self._episode = np.full(n, -1)
        self._step_in_episode = np.zeros(n, dtype=np.int64)
        self._over = np.ones(n, dtype=bool)
        self._untouched = np.zeros(n, dtype=bool)
        # The actions of each running episode, as many as it has steps; there is room for more.
        self._played = np.zeros((n, 256, *self.spec.action_shape), np.int64)

    def _reset(self, tensordict: Any = None, **_: Any) -> Any:
        asked = np.ones(len(self.indices), dtype=bool)
        if tensordict is not None and (mask := tensordict.get("_reset", None)) is not None:
            asked = mask.reshape(-1).numpy()
        asked = asked & ~self._untouched
        if asked.any():
            self._episode[asked] += 1
            self._step_in_episode[asked] = 0
            self._over[asked] = False
            self._untouched[asked] = True
            which = np.flatnonzero(asked)
            self._observation = self._begin(which, [self._episode_seed(int(i), int(self._episode[i])) for i in which])
        over = _column(self._over)
        return TensorDict(
            # An environment that was over and was not asked keeps its place; TorchRL merges by the mask.
            self._observed() | {"done": over, "terminated": over.clone(), "truncated": torch.zeros_like(over)},
            batch_size=self.batch_size,
            device=self.device,
        )

    def _step(self, tensordict: Any) -> Any:
        if self._over.any():
            over = [self.indices[i] for i in np.flatnonzero(self._over)]
            raise RuntimeError(f"environments {over} are over or never started; reset them before the next step")
        action = tensordict["action"].numpy()
        if action.size and not 0 <= action.min() <= action.max() < self.num_actions:
            raise ValueError(
                f"actions are 0 to {self.num_actions - 1} in {self.spec.name!r} but were {action.tolist()}"
            )
        self._observation, reward, terminated, truncated = self._advance(action)
        self._make_room(int(self._step_in_episode.max()) + 1)
        self._played[np.arange(len(action)), self._step_in_episode] = action
        self._untouched[:] = False
        self._step_in_episode += 1
        self._over = terminated | truncated
        return TensorDict(
            self._observed()
            | {
                "reward": _column(reward),
                "done": _column(self._over),
                "terminated": _column(terminated),
                "truncated": _column(truncated),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _observed(self) -> dict[str, Tensor]:
        # Each observation is new memory, so the tensor may share it; the counters live on.
        return {
            "observation": torch.from_numpy(self._observation),
            "episode": torch.from_numpy(self._episode.copy()),
            "step": torch.from_numpy(self._step_in_episode.copy()),
        }

    def _episode_seed(self, i: int, episode: int) -> int:
        # ALE takes a C int and reads a negative one as "no new seed"; the others do with as many.
        return keyed_seed("environment", self._seed, self.indices[i], episode) % 2**31


def padded(
    stacks: NDArray[np.uint8] | None, which: NDArray[np.int64], frames: NDArray[np.uint8], *, num_envs: int, stack: int
) -> NDArray[np.uint8]:
    """The stacks [N, stack·C, H, W] after episodes began with ``frames`` [k, C, H, W] at ``which``; new memory."""
    channels = frames.shape[1]
    shape = (num_envs, stack * channels, *frames.shape[2:])
    begun = np.zeros(shape, dtype=np.uint8) if stacks is None else stacks.copy()
    begun[which, :-channels] = 0
    begun[which, -channels:] = frames
    return begun


def pushed(stacks: NDArray[np.uint8], frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The stacks [N, stack·C, H, W] one frame later, with the newest ``frames`` [N, C, H, W]; new memory."""
    return np.concatenate([stacks[:, frames.shape[1] :], frames], axis=1)


def _column(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(values)).unsqueeze(-1)
