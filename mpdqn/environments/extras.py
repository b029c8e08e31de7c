"""The optional extras of the fields: found without importing them, and named when they are missing."""

from __future__ import annotations

from importlib.util import find_spec


def require_extra(extra: str, *, modules: tuple[str, ...], name: str) -> None:
    """Check that the top-level ``modules`` of ``extra``, which environment ``name`` needs, are installed.

    Raises:
        ValueError: if one is not; it says how to install the extra.
    """
    if any(find_spec(module) is None for module in modules):
        raise ValueError(f"environment {name!r} needs the extra {extra!r}: pip install 'mpdqn[{extra}]'")
