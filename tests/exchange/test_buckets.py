"""Buckets: order, sizes, dtypes."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.exchange.buckets import make_buckets

LIMIT = 64
tensors = st.lists(
    st.builds(
        lambda n, dtype: torch.zeros(n, dtype=dtype),
        st.integers(0, 20),
        st.sampled_from([torch.float32, torch.float64]),
    ),
    max_size=30,
)


def sizes(*counts: int, limit: int = LIMIT) -> list[list[int]]:
    return [[t.numel() for t in bucket] for bucket in make_buckets([torch.zeros(n) for n in counts], limit)]


def test_a_bucket_is_filled_up_to_the_limit_and_not_beyond():
    assert sizes(8, 8, 1, 15, 1) == [[8, 8], [1, 15], [1]]


def test_a_tensor_larger_than_the_limit_travels_alone():
    assert sizes(1, 17, 1) == [[1], [17], [1]]


def test_a_bucket_has_one_dtype():
    parts = [torch.zeros(1), torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), torch.zeros(4)]
    assert [[t.numel() for t in bucket] for bucket in make_buckets(parts, LIMIT)] == [[1], [2, 3], [4]]


def test_no_tensors_no_buckets():
    assert list(make_buckets([], LIMIT)) == []


@settings(deadline=None, derandomize=True, database=None)
@given(tensors)
def test_every_tensor_travels_once_in_order_in_buckets_that_cannot_be_joined(given_tensors: list[torch.Tensor]):
    buckets = list(make_buckets(given_tensors, LIMIT))
    assert [id(t) for bucket in buckets for t in bucket] == [id(t) for t in given_tensors]
    for bucket in buckets:
        assert len({t.dtype for t in bucket}) == 1
        assert len(bucket) == 1 or sum(t.nbytes for t in bucket) <= LIMIT
    for left, right in pairwise(buckets):
        assert left[0].dtype != right[0].dtype or sum(t.nbytes for t in left) + right[0].nbytes > LIMIT
