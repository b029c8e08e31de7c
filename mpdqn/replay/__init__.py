"""Replay as V virtual shards, each a ring of single frames with its own environments and its own random stream.

Any division of the shards among processes samples the same batch: see `VirtualShards`.
"""

from __future__ import annotations

from mpdqn.replay.draw import Draw
from mpdqn.replay.prefetch import Prefetcher
from mpdqn.replay.shard import Shard
from mpdqn.replay.shards import VirtualShards

__all__ = ["Draw", "Prefetcher", "Shard", "VirtualShards"]
