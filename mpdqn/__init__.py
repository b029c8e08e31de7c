"""mpdqn: exact data- and pipeline-parallel training of large convolutional Q-networks.

import mpdqn
comparison = mpdqn.compare(network=make_network, layouts=["single@1", "pp2-1f1b/m8"])
print(comparison.table.markdown(), comparison.verdict)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpdqn.bench.compare import Comparison, compare
    from mpdqn.bench.config import CompareConfig

__version__ = "0.1.0"

__all__ = ["CompareConfig", "Comparison", "compare"]


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that ``import mpdqn.plan`` stays free of torch."""
    if name in ("Comparison", "compare"):
        from mpdqn.bench import compare as module

        return getattr(module, name)
    if name == "CompareConfig":
        from mpdqn.bench.config import CompareConfig

        return CompareConfig
    raise AttributeError(f"module 'mpdqn' has no attribute {name!r}")
