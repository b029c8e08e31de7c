"""Prioritised replay against its formulas, against a naive table of priorities, and beside TorchRL's own sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import LazyTensorStorage, PrioritizedSampler

from mpdqn.dqn.batch import Batch
from mpdqn.dqn.prioritization import Prioritization
from mpdqn.replay import Shard
from mpdqn.replay.sampling import ProportionalSampler
from tests.replay.reference import NaivePriorities, NaiveReplay
from tests.replay.test_shards import assert_equal, make

PRIORITIZATION = Prioritization(alpha=0.6, beta=0.4, beta_updates=10, epsilon=1e-3)


def prioritized(owned=None, *, updates: int = 4, **overrides):
    """Shards whose priorities were returned a few times, each error named by its transition and shard."""
    shards = make(owned, **{"prioritization": PRIORITIZATION} | overrides)
    for update in range(updates):
        draw = shards.draw(16, update)
        shards.return_td_errors(draw.index, errors_of(draw, update))
    return shards


def errors_of(draw, update: int) -> torch.Tensor:
    shard = torch.tensor(draw.shards).repeat_interleave(len(draw.index) // len(draw.shards))
    return torch.sin(draw.index * 7.0 + shard * 3.0 + update) * (shard + 1)


def probabilities(shards) -> dict[tuple[int, int], float]:
    """(shard, row) -> P, from the leaves."""
    found = {}
    for v in shards.owned:
        priority = shards[v].tensors()["priority"]
        for row in priority.nonzero().squeeze(1).tolist():
            found[v, row] = float(priority[row] / priority.sum() / shards.num_shards)
    return found


def test_probabilities_and_weights_are_those_of_the_formulas():
    shards = prioritized()
    expected = probabilities(shards)
    assert len(expected) == len(shards)
    assert len({round(p, 12) for p in expected.values()}) > 20
    draw = shards.draw(32, 7)
    batch = shards.gather(draw)
    assert draw.lowest == pytest.approx(min(expected.values()), rel=1e-12)
    beta = 0.4 + 0.6 * 7 / 10
    assert PRIORITIZATION.beta_at(7) == pytest.approx(beta)
    for i, (index, p) in enumerate(zip(draw.index.tolist(), draw.probability.tolist(), strict=True)):
        shard = shards[i // 8]
        row = index % 2 * shard.length + index // 2 % shard.length
        assert p == pytest.approx(expected[shard.index, row], rel=1e-12)
        assert float(batch.weight[i]) == pytest.approx((min(expected.values()) / p) ** beta, rel=1e-6)
    assert batch.weight.dtype == torch.float32
    lower = shards.gather(draw, lowest=draw.lowest / 3)
    torch.testing.assert_close(lower.weight, batch.weight / 3**beta)
    assert torch.equal(lower.obs, batch.obs)


def test_transitions_are_drawn_as_often_as_their_probability_says():
    shards = prioritized()
    expected = probabilities(shards)
    updates, size = 3000, 16
    counts = dict.fromkeys(expected, 0)
    for update in range(updates):
        draw = shards.draw(size, update)
        for i, index in enumerate(draw.index.tolist()):
            shard = shards[i // 4]
            counts[shard.index, index % 2 * shard.length + index // 2 % shard.length] += 1
    for transition, p in expected.items():
        mean = updates * size * p
        assert abs(counts[transition] - mean) < 5 * math.sqrt(mean), transition


def test_every_slice_of_the_mass_gives_one_draw():
    sampler = ProportionalSampler(8, Prioritization(alpha=1.0, epsilon=1e-12))
    sampler.enter(np.arange(8))
    sampler.update(np.arange(8), np.array([4.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    for update in range(50):
        rows, share = sampler.draw(2, ("slices", update))
        assert rows[0] == 0  # half of the mass is the first row's
        assert 1 <= rows[1] <= 4
        assert share[0] == pytest.approx(0.5)


def test_a_row_without_mass_is_never_drawn():
    sampler = ProportionalSampler(1000, Prioritization(alpha=1.0, epsilon=1e-300))
    rows = np.arange(0, 1000, 7)
    sampler.enter(rows)
    # Sums of such numbers are rounded: the search meets mass that no leaf has.
    sampler.update(rows, 10.0 ** -(np.arange(len(rows)) % 40))
    for update in range(300):
        drawn, share = sampler.draw(64, ("mass", update))
        assert (drawn % 7 == 0).all()
        assert (share > 0).all()


@pytest.mark.parametrize(("num_shards", "replicas"), [(2, 2), (4, 2), (4, 4)])
def test_several_processes_compute_what_one_computes(num_shards, replicas):
    each = num_shards // replicas
    whole = prioritized(num_shards=num_shards)
    parts = [prioritized(range(r * each, (r + 1) * each), num_shards=num_shards) for r in range(replicas)]
    for update in range(4, 8):
        draw, draws = whole.draw(16, update), [part.draw(16, update) for part in parts]
        lowest = min(d.lowest for d in draws)
        assert draw.lowest == lowest
        batches = [part.gather(d, lowest) for part, d in zip(parts, draws, strict=True)]
        assert_equal(whole.gather(draw), Batch.concatenate(batches))
        assert torch.equal(draw.probability, torch.cat([d.probability for d in draws]))
        for shards, d in [(whole, draw), *zip(parts, draws, strict=True)]:
            shards.return_td_errors(d.index, errors_of(d, update), d.shards)
    for part in parts:
        for name, tensor in part.state().items():
            torch.testing.assert_close(tensor, whole.state()[name], rtol=0, atol=0, equal_nan=True)


def test_a_new_transition_has_the_largest_priority_so_far():
    shards = make(prioritization=PRIORITIZATION, num_shards=1)
    priority = shards[0].tensors()["priority"]
    assert set(priority.tolist()) == {0.0, 1.0}
    draw = shards.draw(1, 0)
    shards.return_td_errors(draw.index, torch.tensor([-5.0]))
    largest = (5.0 + 1e-3) ** 0.6
    assert priority.max().item() == largest
    known = int((priority == largest).sum())
    append_one(shards)
    assert int((priority == largest).sum()) > known
    # It stays the largest when the one that had it has another one now.
    shards.return_td_errors(draw.index, torch.tensor([0.5]))
    before = int((priority == largest).sum())
    append_one(shards)
    assert int((priority == largest).sum()) > before


def append_one(shards, steps: int = 1) -> None:
    n = len(shards.owned) * shards.envs_per_shard
    for t in range(steps):
        shards.append(
            observation=torch.full((n, 2, 3, 3), t % 200 + 1, dtype=torch.uint8),
            action=torch.zeros(n),
            reward=torch.zeros(n),
            terminated=torch.zeros(n, dtype=torch.bool),
            truncated=torch.zeros(n, dtype=torch.bool),
            next_observation=torch.full((n, 2, 3, 3), t % 200 + 2, dtype=torch.uint8),
        )


def test_errors_of_overwritten_transitions_change_no_priority():
    shards = make(prioritization=PRIORITIZATION, capacity=80)
    draw = shards.draw(32, 0)
    append_one(shards, 40)  # the whole ring
    before = {name: tensor.clone() for name, tensor in shards.state().items()}
    shards.return_td_errors(draw.index, torch.full((32,), 100.0))
    for name, tensor in shards.state().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_an_error_that_comes_back_to_a_broken_stack_gives_it_no_mass():
    shards = make(prioritization=PRIORITIZATION, num_shards=1, capacity=20, envs_per_shard=1, stack=2, n_step=1)
    oldest = int(shards[0].written[0]) - shards[0].length + 1
    shards.return_td_errors(torch.tensor([oldest]), torch.tensor([3.0]))
    append_one(shards)  # the frame before it is gone, its own row is not
    priority, count = shards[0].tensors()["priority"].clone(), len(shards)
    shards.return_td_errors(torch.tensor([oldest]), torch.tensor([9.0]))
    assert torch.equal(shards[0].tensors()["priority"], priority)
    assert len(shards) == count == int((priority > 0).sum())


def test_an_error_that_is_not_finite_is_refused():
    shards = prioritized()
    draw = shards.draw(16, 0)
    errors = torch.ones(16)
    errors[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 TD errors are not finite, the first is nan"):
        shards.return_td_errors(draw.index, errors)


def test_the_state_moves_priorities_too():
    shards, copy = prioritized(), make(prioritization=PRIORITIZATION)
    copy.load_state({name: tensor.clone() for name, tensor in shards.state().items()})
    for update in range(4, 8):
        draw, again = shards.draw(16, update), copy.draw(16, update)
        assert torch.equal(draw.index, again.index)
        assert torch.equal(draw.probability, again.probability)
        assert draw.lowest == again.lowest
        assert_equal(shards.gather(draw), copy.gather(again))
        for each in (shards, copy):
            each.return_td_errors(draw.index, errors_of(draw, update))
            append_one(each)
    with pytest.raises(ValueError, match=r"holds .* but was given"):
        make().load_state(shards.state())


def test_its_numbers_are_those_of_torchrls_sampler():
    alpha, beta, epsilon, n = 0.6, 0.4, 1e-3, 50
    theirs = PrioritizedSampler(n, alpha=alpha, beta=beta, eps=epsilon, dtype=torch.float64)
    storage = LazyTensorStorage(n)
    storage.set(range(n), torch.zeros(n))
    ours = ProportionalSampler(n, Prioritization(alpha=alpha, beta=beta, epsilon=epsilon))
    errors = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    theirs.update_priority(torch.arange(n), errors)
    ours.enter(np.arange(n))
    ours.update(np.arange(n), errors.numpy())
    index, info = theirs.sample(storage, 64)
    priority = ours.tensors()["priority"]
    share = priority[index] / priority.sum()
    torch.testing.assert_close((ours.lowest / share) ** beta, info["priority_weight"], rtol=1e-12, atol=0)
    counts = np.zeros(n)
    for _ in range(400):
        counts += np.bincount(theirs.sample(storage, 64)[0].numpy(), minlength=n)
    mean = 400 * 64 * (priority / priority.sum()).numpy()
    assert (abs(counts - mean) < 5 * np.sqrt(mean)).all()


@st.composite
def lives(draw):
    """What happens to a shard: steps whose episodes may end, errors that come back late, interruptions."""
    num_envs = draw(st.integers(1, 3))
    ends = st.lists(st.sampled_from(["", "", "", "terminated", "truncated"]), min_size=num_envs, max_size=num_envs)
    errors = st.tuples(st.integers(0, 30), st.floats(0, 10))
    events = draw(st.lists(st.one_of(ends, ends, errors, st.none()), min_size=5, max_size=50))
    return num_envs, draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 12)), events


@settings(max_examples=150, deadline=None)
@given(lives())
def test_it_equals_a_table_of_priorities(life):
    num_envs, stack, n, capacity, events = life
    shard = Shard(
        index=0,
        observation_shape=(stack, 1, 1),
        capacity=capacity,
        num_envs=num_envs,
        seed=0,
        stack=stack,
        n_step=n,
        prioritization=PRIORITIZATION,
    )
    replay, table = NaiveReplay(num_envs), NaivePriorities(alpha=0.6, epsilon=1e-3)
    frames = torch.ones(num_envs, stack, 1, 1, dtype=torch.uint8)
    steps = 0
    for event in events:
        if isinstance(event, list):
            step = {
                "observation": frames,
                "action": torch.zeros(num_envs),
                "reward": torch.zeros(num_envs),
                "terminated": torch.tensor([end == "terminated" for end in event]),
                "truncated": torch.tensor([end == "truncated" for end in event]),
                "next_observation": frames,
            }
            shard.append(**step)
            replay.append(**step)
            steps += 1
        elif event is None:
            shard.interrupt()
            replay.interrupt()
        else:
            back, error = event  # to a transition that may be gone, or may not be complete
            index = torch.tensor([max(0, max(replay.written) - 1 - back) * num_envs])
            written = int(index) // num_envs < replay.written[0]
            if written:
                shard.return_td_errors(index, torch.tensor([-error], dtype=torch.float64))
                table.return_td_error(int(index), error)
        table.settle(replay.transitions(length=shard.length, stack=stack, n=n, discount=0.99, clip=True))
        assert len(shard) == len(table.priority)
        assert shard.num_inserted == steps * num_envs
        stored = shard.tensors()["priority"]
        row = {i: i % num_envs * shard.length + i // num_envs % shard.length for i in table.priority}
        for i, priority in table.priority.items():
            assert float(stored[row[i]]) == pytest.approx(priority, rel=1e-12)
        assert int((stored > 0).sum()) == len(table.priority)
        if table.priority:
            total = sum(table.priority.values())
            assert shard.lowest == pytest.approx(min(table.priority.values()) / total, rel=1e-9)
            rows, share = shard.draw(min(3, len(shard)), steps)
            shares = {row[i]: p / total for i, p in table.priority.items()}
            assert share.tolist() == pytest.approx([shares[r] for r in rows.tolist()], rel=1e-9)
