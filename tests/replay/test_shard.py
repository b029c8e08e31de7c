"""A shard against the naive reference: exact equality, on real Pong and on any pattern of episode ends."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.dqn.prioritization import Prioritization
from mpdqn.environments import AtariEnvironment
from mpdqn.replay import Shard
from tests.replay.reference import NaiveReplay, assert_same


def real_pong(steps: int) -> list[dict[str, torch.Tensor]]:
    """Three games of Pong under random actions; two have frame limits of their own, the third is played to its end."""
    limits = (108_000, 340, 900)
    games = [
        AtariEnvironment("pong", num_envs=1, seed=0, first_index=i, num_threads=1, max_episode_frames=limit)
        for i, limit in enumerate(limits)
    ]
    current = [game.reset() for game in games]
    generator = torch.Generator().manual_seed(0)
    trajectory = []
    for _ in range(steps):
        step = []
        for i, game in enumerate(games):
            current[i]["action"] = torch.randint(6, (1,), generator=generator)
            transition, current[i] = game.step_and_maybe_reset(current[i])
            step.append(transition.clone())
        step = torch.cat(step)
        trajectory.append(
            {
                "observation": step["observation"],
                "action": step["action"],
                # Rewards that clipping changes, and that rounding could spoil.
                "reward": step["next", "reward"].squeeze(1) * 2.7 + 0.1,
                "terminated": step["next", "terminated"].squeeze(1),
                "truncated": step["next", "truncated"].squeeze(1),
                "next_observation": step["next", "observation"],
            }
        )
    for game in games:
        game.close()
    return trajectory


@pytest.fixture(scope="module")
def pong():
    return real_pong(1100)


def pong_shard(**overrides) -> Shard:
    return Shard(
        **{"index": 0, "observation_shape": (4, 84, 84), "capacity": 600, "num_envs": 3, "seed": 0} | overrides
    )


@pytest.mark.parametrize(("n", "clip"), [(1, True), (3, True), (5, False)])
def test_it_equals_the_naive_replay_on_real_pong(pong, n, clip):
    shard = pong_shard(n_step=n, clip_rewards=clip)
    naive = NaiveReplay(3)
    ended = truncated = compared = 0
    for t, step in enumerate(pong):
        shard.append(**step)
        naive.append(**step)
        ended += int(step["terminated"].sum())
        truncated += int(step["truncated"].sum())
        if t in (0, 2, 90, 204, 500, 1099):  # before, at and after the first wrap of the ring
            compared += assert_same(shard, naive, stack=4, n=n, discount=0.99, clip=clip)
    assert ended >= 1
    assert truncated >= 10
    assert compared > 2000


def test_a_full_ring_without_ends_holds_its_capacity():
    shard = pong_shard(capacity=9, n_step=2)
    step = {
        "observation": torch.ones(3, 4, 84, 84, dtype=torch.uint8),
        "action": torch.zeros(3),
        "reward": torch.zeros(3),
        "terminated": torch.zeros(3, dtype=torch.bool),
        "truncated": torch.zeros(3, dtype=torch.bool),
        "next_observation": torch.ones(3, 4, 84, 84, dtype=torch.uint8),
    }
    for _ in range(20):
        shard.append(**step)
    assert len(shard) == shard.capacity == 9


@st.composite
def histories(draw):
    """Sizes of a shard and, for each step and environment: goes on, terminated, truncated, or both."""
    num_envs = draw(st.integers(1, 3))
    outcome = st.sampled_from(["", "", "", "terminated", "truncated", "terminated truncated"])
    steps = draw(st.lists(st.lists(outcome, min_size=num_envs, max_size=num_envs), min_size=1, max_size=40))
    return num_envs, draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 24)), steps


@settings(max_examples=150, deadline=None)
@given(histories())
def test_nothing_ever_crosses_an_end_of_an_episode(history):
    num_envs, stack, n, capacity, steps = history
    shard = Shard(
        index=0,
        observation_shape=(stack, 2, 2),
        capacity=capacity,
        num_envs=num_envs,
        seed=0,
        stack=stack,
        n_step=n,
        discount=0.9,
        clip_rewards=False,
    )
    naive = NaiveReplay(num_envs)
    frame = 0
    stacks = [[torch.zeros(1, 2, 2, dtype=torch.uint8)] * stack for _ in range(num_envs)]

    def see(e: int) -> torch.Tensor:
        nonlocal frame
        frame += 1  # every frame is another one: its number in base 255, plus one, as zeros mean padding
        digits = [1 + frame // 255**k % 255 for k in range(4)]
        stacks[e] = [*stacks[e][1:], torch.tensor(digits, dtype=torch.uint8).view(1, 2, 2)]
        return torch.cat(stacks[e])

    seen = [see(e) for e in range(num_envs)]
    for t, outcomes in enumerate(steps):
        before, after = list(seen), []
        for e, outcome in enumerate(outcomes):
            after.append(see(e))
            seen[e] = after[e]
            if outcome:
                stacks[e] = [torch.zeros(1, 2, 2, dtype=torch.uint8)] * stack
                seen[e] = see(e)
        step = {
            "observation": torch.stack(before),
            "action": torch.arange(num_envs) + t,
            "reward": torch.tensor([float(t * 3 + e) for e in range(num_envs)]),
            "terminated": torch.tensor(["terminated" in o for o in outcomes]),
            "truncated": torch.tensor(["truncated" in o for o in outcomes]),
            "next_observation": torch.stack(after),
        }
        shard.append(**step)
        naive.append(**step)
        assert_same(shard, naive, stack=stack, n=n, discount=0.9, clip=False)


def filled(pong, **overrides) -> Shard:
    shard = pong_shard(**overrides)
    for step in pong[:120]:
        shard.append(**step)
    return shard


def test_sampling_is_named_by_seed_shard_and_update(pong):
    shard = filled(pong)
    one, again, other = shard.sample(64, 5), shard.sample(64, 5), shard.sample(64, 6)
    assert torch.equal(one.index, again.index)
    assert torch.equal(one.obs, again.obs)
    assert not torch.equal(one.index, other.index)
    assert not torch.equal(one.index, filled(pong, index=1).sample(64, 5).index)
    assert not torch.equal(one.index, filled(pong, seed=1).sample(64, 5).index)


def test_sampling_leaves_the_global_generator_alone(pong):
    shard = filled(pong)
    before = torch.get_rng_state()
    shard.sample(8, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_is_uniform(pong):
    shard = filled(pong)
    counts = torch.zeros(120 * 3 + 60)
    for update in range(60):
        index = shard.sample(300, update).index
        counts += torch.bincount(index, minlength=len(counts))
    counts = counts[counts > 0]
    assert len(counts) == len(shard)
    expected = 60 * 300 / len(shard)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(shard) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_too_little_data_names_both_numbers(pong):
    shard = pong_shard()
    with pytest.raises(ValueError, match="4 transitions are asked of shard 0 but 0 can be sampled"):
        shard.sample(4, 0)
    shard.append(**pong[0])
    shard.append(**pong[1])
    with pytest.raises(ValueError, match="4 transitions are asked of shard 0 but 3 can be sampled"):
        shard.sample(4, 0)
    assert len(shard.sample(3, 0)) == 3


@pytest.mark.parametrize("prioritization", [None, Prioritization()])
def test_a_frame_is_stored_once(prioritization):
    shard = pong_shard(capacity=20_000, num_envs=8, n_step=3, prioritization=prioritization)
    rows = 8 * shard.length
    # 84 × 84 pixels and a record; a flag, or a priority and its place in two trees; a few numbers of the environments.
    if prioritization:
        assert shard.num_bytes == rows * (7056 + 24 + 8) + 2 * 16 * 2 ** rows.bit_length() + 8 + 8 * 16 + 8
    else:
        assert shard.num_bytes == rows * (7056 + 24 + 1) + 8 * 16 + 8
    assert shard.num_bytes / shard.capacity * 1e6 <= 6.7 * 2**30


def test_memory_fills_as_the_ring_does():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    shard = pong_shard(capacity=30_000, num_envs=3)
    assert shard.num_bytes > 200e6
    assert resident() - before < 20e6


def test_td_errors_come_back_as_magnitudes_and_are_unknown_before(pong):
    shard = filled(pong)
    batch = shard.sample(16, 0)
    index, inverse = batch.index.unique(return_inverse=True)
    errors = torch.arange(len(index)) - 4.0
    assert shard.tensors()["td_error"].isnan().all()
    shard.return_td_errors(batch.index, errors[inverse])
    stored = shard.tensors()["td_error"]
    assert sorted(stored[~stored.isnan()].tolist()) == sorted(errors.abs().tolist())


def test_td_errors_of_overwritten_transitions_are_left_out(pong):
    shard = filled(pong, capacity=60)
    batch = shard.sample(16, 0)
    for step in pong[120:200]:
        shard.append(**step)
    shard.return_td_errors(batch.index, torch.full((16,), 123.0))
    assert not (shard.tensors()["td_error"] == 123.0).any()


def test_a_new_transition_in_an_old_row_has_no_td_error(pong):
    shard = filled(pong, capacity=60)
    batch = shard.sample(16, 0)
    shard.return_td_errors(batch.index, torch.full((16,), 123.0))
    assert (shard.tensors()["td_error"] == 123.0).any()
    for step in pong[120:200]:
        shard.append(**step)
    assert shard.tensors()["td_error"].isnan().all()


def test_an_interrupted_episode_is_neither_continued_nor_sampled_at_its_end(pong):
    shard = pong_shard(n_step=3)
    for step in pong[:10]:
        shard.append(**step)
    shard.interrupt()
    for step in pong[:10]:
        shard.append(**step)
    assert len(shard) == 2 * 3 * (10 - 3)
    batch = shard.sample(len(shard), 0)
    steps = batch.index // 3
    assert not (((steps >= 7) & (steps < 10)) | (steps >= 17)).any()
    first = shard.gather(torch.tensor([0, 30]))
    assert torch.equal(first.obs[0], first.obs[1])


def test_its_tensors_move_it(pong):
    shard, copy = filled(pong), pong_shard()
    copy.load_tensors({name: tensor.clone() for name, tensor in shard.tensors().items()})
    for step in pong[120:140]:
        shard.append(**step)
        copy.append(**step)
    a, b = shard.sample(32, 9), copy.sample(32, 9)
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.next_obs, b.next_obs)
    with pytest.raises(ValueError, match="capacity, num_envs and n_step must agree"):
        pong_shard(capacity=30).load_tensors(shard.tensors())
    with pytest.raises(ValueError, match="was given"):
        copy.load_tensors({})


@pytest.mark.parametrize("name", ["capacity", "num_envs", "stack", "n_step"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        pong_shard(**{name: 0})


def test_channels_must_be_stacks_of_frames():
    with pytest.raises(ValueError, match="4 channels, which is not a multiple of stack = 3"):
        pong_shard(stack=3)


def test_actions_of_another_shape_are_refused(pong):
    # Three environments and three dimensions: numpy would spread one number over a row.
    with pytest.raises(ValueError, match=r"actions have shape \(3,\) but 3 environments and action_shape \(3,\)"):
        pong_shard(action_shape=(3,)).append(**pong[0])
