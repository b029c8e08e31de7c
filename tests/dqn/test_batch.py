"""`Batch`: rows, dtypes, concatenation."""

from dataclasses import fields

import torch

from mpdqn.dqn.batch import Batch


def batch_of(size: int, first: int = 0) -> Batch:
    column = torch.arange(first, first + size)
    frames = column.to(torch.uint8).reshape(size, 1, 1, 1).expand(size, 4, 3, 2)
    return Batch(
        obs=frames,
        next_obs=frames + 100,
        action=column % 5,
        reward=column.float(),
        discount=column.float() / 8,
        weight=column.float() / 4,
        index=column,
    )


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))


def test_rows_are_views_of_every_field():
    batch = batch_of(6)
    rows = batch.rows(2, 5)
    assert (len(batch), len(rows)) == (6, 3)
    assert same(rows, batch_of(3, first=2))
    assert rows.reward.data_ptr() == batch.reward[2:].data_ptr()


def test_concatenating_the_rows_gives_the_batch_back():
    batch = batch_of(6)
    assert same(Batch.concatenate([batch.rows(0, 1), batch.rows(1, 4), batch.rows(4, 6)]), batch)


def test_only_rewards_discounts_and_weights_change_their_dtype():
    moved = batch_of(3).to(torch.device("cpu"), torch.float64)
    dtypes = {f.name: getattr(moved, f.name).dtype for f in fields(Batch)}
    assert dtypes == {
        "obs": torch.uint8,
        "next_obs": torch.uint8,
        "action": torch.int64,
        "reward": torch.float64,
        "discount": torch.float64,
        "weight": torch.float64,
        "index": torch.int64,
    }
