"""What several rooms' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mpdqn.mesh import World
from tests.passed import pytest_addoption, pytest_configure

__all__ = ["pytest_addoption", "pytest_configure"]


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A process without a launcher, a world of one: all stages of a pipeline still run in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine a second one is waited for more than it helps
    with World.open() as world:
        yield world
    torch.set_num_threads(threads)
