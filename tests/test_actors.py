"""Collection with real games: what is stored is what was played, in one process as in several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from mpdqn.actors import Actors, collect
from mpdqn.dqn.exploration import BLOCK, ExplorationDraws, LinearEpsilon
from mpdqn.environments import make_environment
from mpdqn.replay import VirtualShards

GAME = "qbert"  # its episodes end within some 300 steps, and its rewards are multiples of 25


class SmallNetwork(nn.Module):
    """A quick network whose argmax changes from frame to frame."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.values = nn.Sequential(nn.AvgPool2d(12), nn.Flatten(), nn.Linear(4 * 49, num_actions))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.values(frames.float() / 255)


def make_shards(owned=None, *, num_shards=2, envs_per_shard=1, **overrides) -> VirtualShards:
    settings = {"capacity": 1200, "seed": 0, "clip_rewards": False, "n_step": 1} | overrides
    return VirtualShards(
        observation_shape=(4, 84, 84), num_shards=num_shards, envs_per_shard=envs_per_shard, owned=owned, **settings
    )


def play(shards: VirtualShards, transitions: int, **overrides):
    settings = {
        "epsilon": LinearEpsilon(start=1.0, end=0.1, decay_frames=2000),
        "seed": 5,
        "num_threads": 1,
    } | overrides
    return collect(SmallNetwork(6), GAME, shards, num_transitions=transitions, **settings)


@pytest.fixture(scope="module")
def whole():
    shards = make_shards()
    return shards, play(shards, 1000)


def test_what_is_stored_is_what_was_played(whole):
    """Play the stored actions again and compare every transition, those at ends of episodes above all."""
    shards, stats = whole
    environment = make_environment(GAME, num_envs=2, seed=5, num_threads=1)
    current = environment.reset()
    position, returns, finished, ends = [0, 0], np.zeros(2), [], 0
    for t in range(500):
        rows = [shards[e].gather(torch.tensor([position[e]])) for e in range(2)]
        current["action"] = torch.cat([row.action for row in rows])
        transition, current = environment.step_and_maybe_reset(current)
        after = transition["next"]
        returns += after["reward"].squeeze(1).numpy()
        for e, row in enumerate(rows):
            over = bool(after["done"][e])
            assert torch.equal(row.obs[0], transition["observation"][e])
            if over or t < 499:
                assert torch.equal(row.next_obs[0], after["observation"][e])
            assert row.reward == after["reward"][e]
            assert row.discount == (0.0 if after["terminated"][e] else np.float32(0.99))
            position[e] += 1 + over
            if over:
                finished.append(float(returns[e]))
                returns[e] = 0.0
                ends += 1
    assert ends >= 2
    assert stats.episode_returns == tuple(finished)
    assert max(finished) >= 25  # not clipped
    environment.close()


def test_stats(whole):
    shards, stats = whole
    assert stats.transitions == 1000
    assert stats.frames == 4000
    assert stats.episodes == len(stats.episode_returns) >= 2
    assert stats.mean_return == sum(stats.episode_returns) / stats.episodes
    assert stats.seconds > 0
    assert 998 <= len(shards) <= 1000  # the last transition of an open episode waits for its next frame


def test_several_processes_store_what_one_does(whole):
    """Each owner plays its own environments, as it would in its own process; every stored bit is the same."""
    shards, stats = whole
    finished = []
    for v in (0, 1):
        part = make_shards((v,))
        finished += play(part, 1000).episode_returns
        own, same = part[v].tensors(), shards[v].tensors()
        for name in own:
            torch.testing.assert_close(own[name], same[name], rtol=0, atol=0, equal_nan=True)
    assert sorted(finished) == sorted(stats.episode_returns)


def test_the_number_of_owned_shards_does_not_change_a_greedy_action():
    """A batch of another size rounds otherwise, so that the network sees one shard at a time."""
    sizes = set()

    class Watch(SmallNetwork):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            sizes.add(len(frames))
            assert not torch.is_grad_enabled()
            return super().forward(frames)

    for owned in ((0,), (0, 1, 2)):
        shards = make_shards(owned, num_shards=3, envs_per_shard=2)
        collect(Watch(6), GAME, shards, num_transitions=12, epsilon=0.0, seed=5, num_threads=1)
    assert sizes == {2}


def actors_of(network: nn.Module, shards: VirtualShards, **overrides) -> Actors:
    settings = {"epsilon": 0.0, "seed": 5, "num_threads": 1} | overrides
    sizes = {"num_shards": shards.num_shards, "envs_per_shard": shards.envs_per_shard}
    return Actors(network, GAME, owned=shards.owned, **sizes, **settings)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_actors_go_on_where_they_stopped_whatever_the_size_of_a_chunk(steps):
    at_once, in_parts = make_shards(), make_shards()
    epsilon = LinearEpsilon(start=1.0, end=0.1, decay_frames=2000)
    play(at_once, 4 * 7 * 2)
    with actors_of(SmallNetwork(6), in_parts, epsilon=epsilon, steps=steps) as actors:
        for _ in range(4 * 7 // steps):
            chunk = actors.play()
            assert chunk.num_transitions == 2 * steps
            chunk.store(in_parts)
    for name, tensor in at_once.state().items():
        torch.testing.assert_close(in_parts.state()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_episodes_tell_where_and_when_they_ended(whole):
    """Of the same play, in chunks: each end has the step, the environment, the true return and the length."""
    _, stats = whole
    with actors_of(
        SmallNetwork(6), make_shards(), epsilon=LinearEpsilon(start=1.0, end=0.1, decay_frames=2000), steps=50
    ) as actors:
        chunks, ended = [], []
        for _ in range(10):
            chunk = actors.play()
            chunks.append([getattr(chunk, k).clone() for k in ("reward", "terminated", "truncated")])
            ended += chunk.episodes
    reward, terminated, truncated = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert tuple(e.episode_return for e in ended) == stats.episode_returns
    places = (terminated | truncated).nonzero().tolist()
    assert [[e.step, e.environment] for e in ended] == places
    for e in ended:
        begin = e.step + 1 - e.length
        assert float(reward[begin : e.step + 1, e.environment].sum()) == e.episode_return
        assert begin == 0 or [begin - 1, e.environment] in places


def test_epsilon_falls_with_the_frames_of_all_environments():
    asked = []

    def epsilon(frames: int) -> float:
        asked.append(frames)
        return 1.0

    play(make_shards((1,)), 10, epsilon=epsilon)
    assert asked == [0, 0, 8, 16, 24, 32], "the collector tries the policy once before the first step"


def test_learned_weights_are_played_at_once():
    network = SmallNetwork(6)
    actions = []
    with actors_of(network, make_shards()) as actors:
        for action in (1, 4):
            with torch.no_grad():
                network.values[2].weight.zero_()
                network.values[2].bias.copy_(torch.eye(6)[action])
            actions += [actors.play().action[0, 0].item() for _ in range(3)]
    assert actions == [1, 1, 1, 4, 4, 4]


def test_each_step_is_announced_to_networks_that_draw_noise():
    steps = []
    with actors_of(SmallNetwork(6), make_shards(), before_step=steps.append, steps=3) as actors:
        actors.play()
        actors.play()
    assert steps == [0, 0, 1, 2, 3, 4, 5], "the collector tries the policy once before the first step"


def test_the_bar_counts_transitions_on_stderr(capsys):
    play(make_shards(), 8, progress=True)
    play(make_shards(), 8)
    out, err = capsys.readouterr()
    assert out == ""
    assert "/8 [" in err
    assert "transitions/s" in err


def test_owned_shards_must_be_consecutive():
    with pytest.raises(ValueError, match=r"\[0, 2\] are not consecutive"):
        play(make_shards((0, 2), num_shards=3), 8)


def test_no_episode_no_mean():
    assert math.isnan(play(make_shards(), 2).mean_return)


def test_draws_are_named_by_environment_episode_and_step():
    several = ExplorationDraws(seed=3, environments=range(4), num_actions=6)
    alone = ExplorationDraws(seed=3, environments=[2], num_actions=6)
    for episode, step in [(0, 0), (0, 1), (0, BLOCK), (1, 0), (0, 1)]:
        where = np.full(4, episode), np.full(4, step)
        threshold, action = several.draw(*where)
        one, chosen = alone.draw(where[0][:1], where[1][:1])
        assert (threshold[2], action[2]) == (one[0], chosen[0])
        assert len(set(threshold)) == 4
    threshold = [alone.draw(np.array([0]), np.array([t]))[0][0] for t in range(3 * BLOCK)]
    assert len(set(threshold)) == 3 * BLOCK
    assert abs(np.mean(threshold) - 0.5) < 0.05
    assert 0 <= min(threshold) < max(threshold) < 1


def test_draws_fill_all_actions():
    draws = ExplorationDraws(seed=0, environments=[0], num_actions=3)
    assert {int(draws.draw(np.array([0]), np.array([t]))[1][0]) for t in range(50)} == {0, 1, 2}


def test_linear_epsilon():
    epsilon = LinearEpsilon(start=1.0, end=0.1, decay_frames=100)
    assert [epsilon(0), epsilon(50), epsilon(100), epsilon(1000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert LinearEpsilon(start=1.0, end=0.2, decay_frames=0)(0) == pytest.approx(0.2)


def test_each_dimension_of_an_action_is_drawn():
    draws = ExplorationDraws(seed=0, environments=[0, 1], num_actions=3, action_shape=(4,))
    _, action = draws.draw(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64))
    assert action.shape == (2, 4)
    several = np.stack([draws.draw(np.zeros(2, dtype=np.int64), np.full(2, t))[1] for t in range(100)])
    assert set(several.flatten().tolist()) == {0, 1, 2}
    assert (several[..., 0] != several[..., 1]).any()
