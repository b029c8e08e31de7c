"""Environments that go on where others were: from the seeds and actions of their running episodes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mpdqn.actors import Actors
from mpdqn.environments import BatchedEnvironment, make_environment
from tests.environments.playing import play, some_actions
from tests.environments.test_workers import register

KINDS: dict[str, dict[str, Any]] = {
    "minatar-breakout": {"name": "minatar-breakout"},
    "minatar-seaquest": {"name": "minatar-seaquest"},
    "breakout": {"name": "breakout", "steps": 200},
    "own": {"name": "mpdqn-tests/Calm-v0"},
    "own in workers": {"name": "mpdqn-tests/Calm-v0", "workers": 2},
    "box": {"name": "tests.environments.toy:mpdqn-tests/Box-v0"},
    "car-racing": {"name": "car-racing", "steps": 12, "num_envs": 1},
    "highway": {"name": "highway", "steps": 12, "num_envs": 1},
    "reacher": {"name": "reacher", "steps": 12, "num_envs": 1},
}


def make(name: str, num_envs: int = 3, workers: int = 0, seed: int = 5) -> BatchedEnvironment:
    return make_environment(name, num_envs=num_envs, seed=seed, first_index=2, workers=workers)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine a second one is waited for more than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_another_one_goes_on_where_it_was(kind: str) -> None:
    register("mpdqn-tests/Calm-v0")
    settings = dict(KINDS[kind])
    steps = settings.pop("steps", 60)
    one, other = make(**settings), make(**settings)
    actions = some_actions(one, 2 * steps)
    state: dict[str, torch.Tensor] = {}
    expected = play(one, actions, lambda t: state.update(one.state() if t == steps else {}))[steps:]
    other.reset()  # as a collector does when it is made
    other.load_state(state)
    if settings.get("workers"):  # and dies: what it was told to play again is played again once more
        os.kill(other._crew.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
    assert bool((play(other, actions[steps:]) == expected).all())
    assert expected["episode"].max() > 0 or steps < 60
    one.close()
    other.close()


def test_an_episode_that_comes_out_differently_is_an_error() -> None:
    one, other = make("minatar-breakout"), make("minatar-breakout", seed=6)
    play(one, some_actions(one, 40))
    with pytest.raises(
        ValueError, match=r"shows another frame after the same \d+ actions of episode \d+; it is another"
    ):
        other.load_state(one.state())


def test_new_episodes_follow_those_that_are_left() -> None:
    one, other = make("minatar-breakout"), make("minatar-breakout")
    play(one, some_actions(one, 40))
    state = one.state()
    other.load_state(state, begin_anew=True)
    assert (other.reset()["episode"] == state["episode"] + 1).all()


def test_actors_go_on_with_returns_and_counts() -> None:
    network = _Floats(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(400, 3)))

    def actors() -> Actors:
        options: dict[str, Any] = {"owned": [1], "num_shards": 2, "envs_per_shard": 3, "seed": 1, "steps": 2}
        return Actors(network, "minatar-breakout", epsilon=0.9, **options)

    with actors() as one, actors() as other:
        for _ in range(30):
            one.play()
        other.load_state({name: t.clone() for name, t in one.state().items()}, one.steps_played)
        for _ in range(30):
            a, b = one.play(), other.play()
            assert a.episodes == b.episodes
            assert torch.equal(a.action, b.action)
            assert torch.equal(a.next_frame, b.next_frame)
        assert one.steps_played == other.steps_played == 120


class _Floats(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.network(x.float())
        return values
