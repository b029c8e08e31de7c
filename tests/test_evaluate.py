"""Evaluation: whole episodes by start order, true rewards, draws of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from mpdqn import evaluate as module
from mpdqn.environments import EnvironmentSpec
from mpdqn.evaluate import Evaluation, argmax, evaluate
from mpdqn.networks import make_network

SPEC = EnvironmentSpec(name="lengths", observation_shape=(2, 3, 3), num_actions=4, stack=2)


class Lengths(EnvBase):  # type: ignore[misc]
    """Environment i's first episode takes LENGTHS[i] steps; a step earns 100 + the action."""

    LENGTHS = (2, 9, 3, 9, 4, 9, 5, 9, 6, 9)

    def __init__(self, *, num_envs: int, first_index: int, branches: int = 0, limit: int = 10**9) -> None:
        super().__init__(batch_size=torch.Size([num_envs]))
        self.indices = range(first_index, first_index + num_envs)
        n, flag = num_envs, Binary(1, dtype=torch.bool).expand(num_envs, 1)
        self.observation_spec = Composite(observation=Unbounded((n, 2, 3, 3), dtype=torch.uint8), shape=(n,))
        self.action_spec = Categorical(4, shape=(n, branches) if branches else (n,), dtype=torch.int64)
        self.reward_spec = Unbounded((n, 1))
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(n,))
        self._count, self._limit = torch.zeros(n, dtype=torch.int64), limit

    def _set_seed(self, seed: int | None) -> None: ...

    def _observed(self) -> Tensor:
        return (torch.tensor(self.indices) * 16 + self._count).to(torch.uint8)[:, None, None, None].expand(-1, 2, 3, 3)

    def _reset(self, tensordict: Any = None, **_: Any) -> Any:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self._count[slice(None) if mask is None else mask.reshape(-1)] = 0
        return TensorDict({"observation": self._observed()}, self.batch_size)

    def _step(self, tensordict: Any) -> Any:
        self._count += 1
        terminated = (self._count == torch.tensor([self.LENGTHS[i] for i in self.indices]))[:, None]
        truncated = (self._count == self._limit)[:, None]
        action = tensordict["action"].reshape(len(self.indices), -1)
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return TensorDict(
            {"observation": self._observed(), "reward": 100.0 + action.sum(1, keepdim=True), **flags}, self.batch_size
        )


class Zeros(nn.Module):
    """Values that are best for action 3; notes the frames that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(x)
        return torch.arange(4.0).expand(len(x), 4)


class Floats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    settings: dict[str, Any] = {}

    def make(name: str, *, num_envs: int, first_index: int, **_: Any) -> Lengths:
        return Lengths(num_envs=num_envs, first_index=first_index, **settings)

    def spec(name: str, **_: Any) -> EnvironmentSpec:
        return SPEC if not settings.get("branches") else EnvironmentSpec(**vars(SPEC) | {"branches": 2})

    monkeypatch.setattr(module, "make_environment", make)
    monkeypatch.setattr(module, "environment_spec", spec)
    return settings


@pytest.mark.parametrize("num_envs", [1, 3, 8, 20])
def test_the_first_episodes_that_start_are_counted(lengths: dict[str, Any], num_envs: int) -> None:
    network = Zeros()
    result = evaluate(network, "lengths", episodes=7, epsilon=0.0, seed=0, num_envs=num_envs)
    assert result.lengths == Lengths.LENGTHS[:7]
    assert result.returns == tuple(103.0 * length for length in Lengths.LENGTHS[:7]), "true rewards, greedy actions"
    assert result.truncated == (False,) * 7
    assert result.frames == 4 * sum(Lengths.LENGTHS[:7])
    assert network.training
    assert all(len(rows) == 8 for rows in network.seen), "the network always sees as many rows"
    assert not any(rows[:, 0, 0, 0].count_nonzero() > num_envs for rows in network.seen)


@pytest.mark.parametrize("num_envs", [1, 5, 20])
def test_an_episode_keeps_its_row_and_its_draws(lengths: dict[str, Any], num_envs: int) -> None:
    reference = evaluate(Zeros(), "lengths", episodes=10, epsilon=0.5, seed=3)
    network = Zeros()
    assert (
        evaluate(network, "lengths", episodes=10, epsilon=0.5, seed=3, num_envs=num_envs).returns == reference.returns
    )
    for rows in network.seen:
        for row, episode in enumerate(rows[:, 0, 0, 0].tolist()):
            assert episode == 0 or episode // 16 % 8 == row
    assert evaluate(Zeros(), "lengths", episodes=10, epsilon=0.5, seed=4).returns != reference.returns


def test_epsilon_is_the_share_of_uniform_actions(lengths: dict[str, Any]) -> None:
    network = Zeros()
    result = evaluate(network, "lengths", episodes=10, epsilon=1.0, seed=0)
    assert not network.seen
    per_step = (sum(result.returns) - 100 * sum(result.lengths)) / sum(result.lengths)
    assert per_step == pytest.approx(1.5, abs=0.5)


def test_limits_truncate(lengths: dict[str, Any]) -> None:
    result = evaluate(Zeros(), "lengths", episodes=3, epsilon=0.0, seed=0, max_steps=3)
    assert result.lengths == (2, 3, 3)
    assert result.truncated == (False, True, False)
    lengths["limit"] = 4
    assert evaluate(Zeros(), "lengths", episodes=3, epsilon=0.0, seed=0).truncated == (False, True, False)


def test_actions_of_several_branches(lengths: dict[str, Any]) -> None:
    lengths["branches"] = 2

    def best(output: Tensor) -> Tensor:
        return argmax(output)[:, None].expand(-1, 2)

    result = evaluate(Zeros(), "lengths", episodes=2, epsilon=0.0, seed=0, greedy=best)
    assert result.returns == (106.0 * 2, 106.0 * 9)
    assert evaluate(Zeros(), "lengths", episodes=2, epsilon=1.0, seed=0).returns != result.returns


def test_what_episode_0_shows(lengths: dict[str, Any]) -> None:
    frames: list[Any] = []
    evaluate(Zeros(), "lengths", episodes=4, epsilon=0.0, seed=0, num_envs=2, watch=frames.append)
    assert [frame.shape for frame in frames] == [(1, 3, 3)] * 2, "until it is over"


def test_a_module_that_was_not_training_stays_so(lengths: dict[str, Any]) -> None:
    network = nn.Sequential(Zeros(), nn.Dropout())
    network[1].eval()
    evaluate(network, "lengths", episodes=1, epsilon=0.0, seed=0)
    assert [part.training for part in network] == [True, False]


def test_a_game_is_the_same_however_many_are_played_at_a_time() -> None:
    """Q*bert to its end: what it earns are multiples of 25, so clipped rewards would show."""
    network = make_network("nature", (4, 84, 84), 6, width=None, seed=1)
    frames: list[list[NDArray[np.uint8]]] = [[], []]
    two, three = (
        evaluate(network, "qbert", episodes=3, epsilon=0.5, seed=5, num_envs=n, watch=frames[n - 2].append)
        for n in (2, 3)
    )
    assert (two.returns, two.lengths) == (three.returns, three.lengths)
    assert np.array_equal(*frames)
    assert len(frames[0]) == two.lengths[0]
    assert not any(two.truncated)
    assert all(earned % 25 == 0 for earned in two.returns)
    assert max(two.returns) > max(two.lengths)
    assert two.frames == 4 * sum(two.lengths)


def test_minatar() -> None:
    """One frame a step, a stack of one, channels that are objects."""
    pytest.importorskip("minatar")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), Floats(), nn.Linear(400, 3))
    one, many = (evaluate(network, "minatar/breakout", episodes=5, epsilon=0.5, seed=0, num_envs=n) for n in (1, 5))
    assert (one.returns, one.lengths) == (many.returns, many.lengths)
    assert one.frames == sum(one.lengths)
    assert one.environment == "minatar-breakout"
    assert len(set(one.lengths)) > 1


def test_the_numbers_of_an_evaluation() -> None:
    returns = (-21.0, 14.6, 14.6, 20.0)
    result = Evaluation(
        environment="pong",
        epsilon=0.0,
        seed=0,
        returns=returns,
        lengths=(1,) * 4,
        truncated=(False,) * 4,
        frames=16,
        seconds=1.0,
    )
    assert (result.mean, result.median, result.iqm) == (pytest.approx(7.05), 14.6, 14.6)
    assert result.human_normalized == pytest.approx((7.05 + 20.7) / 35.3)
    assert result.interval().low < result.mean < result.interval().high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "episodes is 0"),
        ({"num_envs": 0}, "num_envs 0"),
        ({"max_steps": 0}, "max_steps 0"),
        ({"epsilon": 1.5}, r"epsilon is 1\.5"),
        ({"environment": "pomg"}, "try 'pong'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Zeros(), **{"environment": "pong", "episodes": 1, "epsilon": 0.0, "seed": 0} | settings)
