"""`evaluate`: play whole episodes with fixed weights, and return what they really earned.

    episode    0  1 … 7 │ 8  9 … 15 │ …       episode i is environment i, played once: a function of the seed, i and
    row        0  1 … 7 │ 0  1 …  7 │ …       the weights, however many are played at a time
               └ a wave of num_envs ┘

Exactly the first n episodes that start are counted. Counting the first n that *end* would favour the short ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpdqn.environments import environment_spec, make_environment
from mpdqn.environments.spec import EnvironmentSpec
from mpdqn.randomness import keyed_seed
from mpdqn.scores import Interval, bootstrap_interval, human_normalized, iqm

EVALUATION_EPSILON = 0.001
"""The ε of Dopamine's evaluation (Castro et al. 2018); Mnih et al. 2015 used 0.05."""

MOST_FRAMES = 108_000
"""Frames after which an episode is cut short, as Atari's are: a greedy policy may stand still for ever."""

ROWS = 8  # observations in each call of the network
Greedy = Callable[[Tensor], Tensor]
Watch = Callable[[NDArray[np.uint8]], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Episodes in the order of their starts.

    ``returns`` are undiscounted sums of the environment's own rewards, ``lengths`` agent steps; ``truncated`` says of
    each episode whether a limit ended it, the environment's or ``max_steps``, and not the game.
    """

    environment: str
    epsilon: float
    seed: int
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    frames: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def median(self) -> float:
        """Median return."""
        return float(np.median(self.returns))

    @property
    def iqm(self) -> float:
        """Interquartile mean of the returns."""
        return iqm(self.returns)

    @property
    def human_normalized(self) -> float:
        """The mean return, where a random agent has 0 and a human tester 1; NaN where none was measured."""
        return human_normalized(self.environment, self.mean)

    def interval(self, confidence: float = 0.95) -> Interval:
        """The mean return with its bootstrap interval: how far other episodes *of these weights* may lie.

        It says nothing of another training run; for that, give the scores of several to
        `mpdqn.scores.bootstrap_interval`.
        """
        return bootstrap_interval(self.returns, "mean", confidence=confidence, seed=self.seed)


def argmax(output: Tensor) -> Tensor:
    """The greedy action int64 [B] of values [B, A]."""
    return output.argmax(dim=1)


def _ignore(frame: NDArray[np.uint8]) -> None:
    pass


def evaluate(
    network: nn.Module,
    environment: str,
    *,
    episodes: int,
    epsilon: float = EVALUATION_EPSILON,
    seed: int,
    greedy: Greedy = argmax,
    num_envs: int = ROWS,
    device: torch.device | str = "cpu",
    max_steps: int | None = None,
    num_threads: int = 0,
    workers: int = 0,
    bins: int | None = None,
    watch: Watch = _ignore,
) -> Evaluation:
    """Play ``episodes`` episodes ε-greedily, with rewards as the game gives them and its sticky actions.

    Episode i is the first one of environment i under a seed of evaluation's own, explored with draws of its own: other
    than in training, and the same for any ``num_envs``. The network is in evaluation mode meanwhile.

    Args:
        network: uint8 [B, C, H, W] -> its output, on ``device`` already.
        environment: see `mpdqn.environments.make_environment`.
        episodes: how many, at least 1.
        epsilon: probability of a uniform action; 0 is greedy.
        seed: of environments and exploration.
        greedy: the network's output -> action int64 [B], or [B, D] for D discretised dimensions; default
            `argmax`.
        num_envs: how many episodes are played at a time; best a multiple of 8. One that is over waits for the others.
        device: where the network is.
        max_steps: agent steps after which an episode is cut short, besides the environment's own limit; default: those
            of `MOST_FRAMES`.
        num_threads: threads that step Atari games; 0 leaves it to the cores.
        workers: processes in which simulators written in Python run; 0 is this one (and one for what MuJoCo draws).
        bins: values of each dimension of a continuous action; None for 3.
        watch: gets each newest frame that the agent sees of episode 0, uint8 [c, H, W], see `mpdqn.video`.

    Raises:
        ValueError: if a count or ``epsilon`` is out of range, or the name is no environment.
    """
    if episodes < 1 or num_envs < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"episodes is {episodes}, num_envs {num_envs} and max_steps {max_steps}; each is at least 1")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}, but a probability lies in [0, 1]; for greedy play give 0")
    spec = environment_spec(environment, bins=bins)
    limit = MOST_FRAMES // spec.frames_per_action if max_steps is None else max_steps
    policy = _Policy(network, greedy, spec, epsilon=epsilon, seed=seed, device=torch.device(device))
    start = time.perf_counter()
    played: list[_Episode] = []
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        for first in range(0, episodes, num_envs):
            games = make_environment(
                environment,
                num_envs=min(num_envs, episodes - first),
                seed=keyed_seed("evaluation", seed),
                first_index=first,
                num_threads=num_threads,
                workers=workers,
                bins=bins,
            )
            try:
                played += _wave(games, policy, first, spec.action_shape, limit, _ignore if first else watch)
            finally:
                games.close()
    finally:
        for module in training:
            module.training = True
    return Evaluation(
        environment=spec.name,
        epsilon=epsilon,
        seed=seed,
        returns=tuple(episode.earned for episode in played),
        lengths=tuple(episode.length for episode in played),
        truncated=tuple(episode.truncated for episode in played),
        frames=sum(episode.length for episode in played) * spec.frames_per_action,
        seconds=time.perf_counter() - start,
    )


@dataclass
class _Episode:
    """What an episode earned so far, in how many agent steps."""

    earned: float = 0.0
    length: int = 0
    over: bool = False
    truncated: bool = False


def _wave(
    games: Any, policy: _Policy, first: int, action_shape: tuple[int, ...], max_steps: int, watch: Watch
) -> list[_Episode]:
    """Play episodes ``first``, ``first`` + 1, … in ``games``, one in each, until all are over."""
    episodes = [_Episode() for _ in games.indices]
    state = games.reset()
    while live := [i for i, episode in enumerate(episodes) if not episode.over]:
        observation = state["observation"]
        if not episodes[0].over:
            watch(policy.newest(observation[0]))
        # What is over plays another episode, that nobody counts, with action 0: the games step together.
        action = np.zeros((len(episodes), *action_shape), dtype=np.int64)
        action[live] = policy.act(observation[live], [first + i for i in live])
        state["action"] = torch.from_numpy(action)
        step, state = games.step_and_maybe_reset(state)
        after = step["next"]
        for i in live:
            episode = episodes[i]
            episode.earned += float(after["reward"][i])
            episode.length += 1
            ended = bool(after["done"][i])
            episode.over = ended or episode.length == max_steps
            episode.truncated = episode.over and not bool(after["terminated"][i])
    return episodes


class _Policy:
    """ε-greedy actions; the draws of an episode come from a generator of its own.

    The network always sees 8 rows, episode i in row i % 8: a matrix product of another number of rows, or a row at
    another place, may round otherwise, and one flipped argmax would make another game of it.
    """

    def __init__(
        self,
        network: nn.Module,
        greedy: Greedy,
        spec: EnvironmentSpec,
        *,
        epsilon: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._network, self._greedy, self._spec = network, greedy, spec
        self._epsilon, self._seed, self._device = epsilon, seed, device
        self._draws: dict[int, np.random.Generator] = {}

    def act(self, observation: Tensor, episodes: Sequence[int]) -> NDArray[np.int64]:
        """The actions [b, …] of those episodes, given their observations uint8 [b, C, H, W] in the same order."""
        action = np.empty((len(episodes), *self._spec.action_shape), dtype=np.int64)
        thinks = []
        for row, episode in enumerate(episodes):
            draws = self._draws.get(episode)
            if draws is None:
                draws = self._draws[episode] = np.random.default_rng(
                    keyed_seed("evaluation exploration", self._seed, episode)
                )
            # Both are drawn every time, so that the stream doesn't depend on ε.
            explores = draws.random() < self._epsilon
            action[row] = draws.integers(self._spec.num_actions, size=self._spec.action_shape)
            if not explores:
                thinks.append(row)
        for group in sorted({episodes[row] // ROWS for row in thinks}):
            rows = [row for row in thinks if episodes[row] // ROWS == group]
            places = [episodes[row] % ROWS for row in rows]
            action[rows] = self._best(observation[rows], places)
        return action

    @torch.inference_mode()
    def _best(self, observation: Tensor, places: Sequence[int]) -> NDArray[np.int64]:
        batch = observation.new_zeros((ROWS, *observation.shape[1:]))
        batch[places] = observation
        best: NDArray[np.int64] = self._greedy(self._network(batch.to(self._device))).cpu().numpy()
        return best[places]

    def newest(self, observation: Tensor) -> NDArray[np.uint8]:
        """The newest frame uint8 [c, H, W] of a stack [C, H, W]."""
        frame: NDArray[np.uint8] = observation[-(len(observation) // self._spec.stack) :].numpy()
        return frame
