"""Keyed randomness: every random stream is named by what it is for, never by the order in which it is drawn.

Two layouts execute the same computation in different orders. They draw the same numbers all the same, because a
stream's seed is a hash of its name: ``("sampling", seed, shard, update)``, ``("exploration", seed, environment,
episode)``, ``("initialization", seed, layer name)``.
"""

from __future__ import annotations

import hashlib


def keyed_seed(*key: str | int) -> int:
    """The seed of the stream that ``key`` names: a non-negative integer below 2**63, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_bytes(count: int, *key: str | int) -> bytes:
    """The first ``count`` bytes of the stream that ``key`` names; a short stream costs less than a generator."""
    return hashlib.shake_128(repr(key).encode()).digest(count)
