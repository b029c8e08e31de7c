"""Virtual shards: any division among replicas gives the same batch, in the same order."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from mpdqn.dqn.batch import Batch
from mpdqn.replay import VirtualShards


def make(owned=None, num_shards=4, **overrides) -> VirtualShards:
    """Shards that hold 30 steps of what their environments, numbered globally, would have seen."""
    settings = {"capacity": 400, "envs_per_shard": 2, "seed": 0, "n_step": 2, "stack": 2} | overrides
    shards = VirtualShards(observation_shape=(2, 3, 3), num_shards=num_shards, owned=owned, **settings)
    environments = torch.tensor([v * 2 + i for v in shards.owned for i in range(2)])
    for t in range(30):
        frame = (environments * 30 + t + 1).to(torch.uint8)
        frames = frame[:, None, None, None].expand(-1, 2, 3, 3)
        shards.append(
            observation=frames,
            action=environments + t,
            reward=environments * 0.1 + t,
            terminated=(environments + t) % 11 == 0,
            truncated=(environments + t) % 7 == 0,
            next_observation=frames + 1,
        )
    return shards


def assert_equal(a: Batch, b: Batch) -> None:
    for f in fields(Batch):
        assert torch.equal(getattr(a, f.name), getattr(b, f.name)), f.name


@pytest.mark.parametrize(("num_shards", "replicas"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_the_replicas_batches_joined_are_the_batch(num_shards, replicas):
    whole = make(num_shards=num_shards)
    each = num_shards // replicas
    parts = [make(range(r * each, (r + 1) * each), num_shards) for r in range(replicas)]
    for update in range(3):
        batch = whole.sample(16, update)
        assert len(batch) == 16
        assert_equal(batch, Batch.concatenate([part.sample(16, update) for part in parts]))
        by_name = [whole.sample(16, update, range(r * each, (r + 1) * each)) for r in range(replicas)]
        assert_equal(batch, Batch.concatenate(by_name))


def test_td_errors_go_back_to_the_shards_they_came_from():
    whole, part = make(), make((2, 3))
    batch = whole.sample(16, 0)
    errors = torch.arange(16) - 8.0
    whole.return_td_errors(batch.index, errors)
    part.return_td_errors(batch.index[8:], errors[8:])
    for v in (2, 3):
        torch.testing.assert_close(
            whole[v].tensors()["td_error"], part[v].tensors()["td_error"], rtol=0, atol=0, equal_nan=True
        )
    other = make()
    other.return_td_errors(batch.index[4:8], errors[4:8], shards=[1])
    assert other[0].tensors()["td_error"].nan_to_num().eq(0).all()
    assert torch.equal(other[1].tensors()["td_error"].nan_to_num(), whole[1].tensors()["td_error"].nan_to_num())
    with pytest.raises(ValueError, match="3 TD errors for 16 transitions"):
        whole.return_td_errors(batch.index, errors[:3])


def test_whole_shards_move_between_owners():
    whole = make()
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    part = VirtualShards(
        observation_shape=(2, 3, 3),
        num_shards=4,
        capacity=400,
        envs_per_shard=2,
        seed=0,
        n_step=2,
        stack=2,
        owned=(1, 3),
    )
    assert len(part) == 0
    part.load_state(state)
    assert len(part) == len(whole[1]) + len(whole[3])
    assert_equal(part.sample(16, 4), whole.sample(16, 4, shards=(1, 3)))


def test_sizes():
    shards = make(num_shards=4, capacity=403)
    assert shards[0].capacity == 102
    assert shards.num_envs == 8
    assert len(shards) == sum(len(shards[v]) for v in shards.owned)


def test_errors_name_the_numbers():
    shards = make((0, 1))
    with pytest.raises(ValueError, match="batch_size 30 is not a multiple of the 4 virtual shards; try 32"):
        shards.sample(30, 0)
    with pytest.raises(ValueError, match=r"shard 2 is not among the shards \[0, 1\]"):
        shards.sample(16, 0, shards=[2])
    with pytest.raises(ValueError, match="1000 transitions are asked of shard 0 but"):
        shards.sample(4000, 0)
    with pytest.raises(ValueError, match="num_shards is 0"):
        make(num_shards=0)
    for owned in ((0, 0), (0, 4), (-1,)):
        with pytest.raises(ValueError, match="not different numbers below num_shards = 4"):
            make(owned)


def test_actions_of_several_dimensions():
    settings = {"observation_shape": (2, 3, 3), "num_shards": 2, "capacity": 40, "envs_per_shard": 2, "seed": 0}
    shards = VirtualShards(**settings, stack=2, action_shape=(3,))
    frames = torch.ones(4, 2, 3, 3, dtype=torch.uint8)
    for t in range(5):
        shards.append(
            observation=frames,
            action=torch.tensor([[t, e, t * e] for e in range(4)]),
            reward=torch.zeros(4),
            terminated=torch.zeros(4, dtype=torch.bool),
            truncated=torch.tensor([t == 2] * 4),
            next_observation=frames,
        )
    batch = shards.sample(8, 0)
    assert (batch.action.shape, batch.action.dtype) == ((8, 3), torch.int64)
    position, env = batch.index // 2, batch.index % 2 + torch.arange(2).repeat_interleave(4) * 2
    step = torch.where(position > 3, position - 1, position)  # an ended episode has one row more
    assert torch.equal(batch.action, torch.stack([step, env, step * env], dim=1))
    flat = VirtualShards(**settings, stack=2)
    assert shards[0].num_bytes - flat[0].num_bytes == 16 * 2 * flat[0].length


def test_what_was_inserted_is_counted_and_travels_with_the_state():
    shards, copy = make(), make(capacity=400, owned=(1, 2))
    assert shards.num_inserted == 30 * 8
    assert shards.num_inserted > len(shards)
    copy.load_state({name: tensor * (name.endswith("num_inserted") + 1) for name, tensor in shards.state().items()})
    assert copy.num_inserted == 2 * 30 * 4


def test_a_draw_touches_no_frames_and_names_its_transitions():
    shards = make()
    draw = shards.draw(16, 3, (2, 0))
    assert draw.shards == (2, 0)
    assert (draw.update, draw.probability, draw.lowest) == (3, None, float("inf"))
    batch = shards.gather(draw)
    assert torch.equal(batch.index, draw.index)
    assert torch.equal(batch.weight, torch.ones(8))
    assert_equal(batch, shards.sample(16, 3, (2, 0)))
