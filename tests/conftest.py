"""What several rooms' tests share, and what holds for each test: one thread, and ranks only where it says so.

A test that starts ranks, or a command, is marked ``pool``; the first of them starts the server that forks the ranks of
all (`mpdqn.forkserver`). `pytest -m "not pool"` needs none.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import pytest

from mpdqn import forkserver
from tests import processes
from tests.passed import pytest_addoption, pytest_configure

__all__ = ["pytest_addoption", "pytest_configure"]

if TYPE_CHECKING:
    from mpdqn.mesh import World

P, T = ParamSpec("P"), TypeVar("T")

# Before torch is imported. On a busy machine a second thread is waited for more than it helps.
os.environ.setdefault("OMP_NUM_THREADS", "1")


CORES = sorted(os.sched_getaffinity(0))
OTHERS = os.environ.get("PYTEST_XDIST_WORKER")
"""gw0, gw1, … where the tests are run by several processes."""


class _Guard:
    """Ranks and commands are started by tests with the mark only."""

    def __init__(self) -> None:
        self.marked = False

    def __call__(self, start: Callable[P, T]) -> Callable[P, T]:
        """Return ``start`` for marked tests only."""

        @functools.wraps(start)
        def checked(*args: P.args, **options: P.kwargs) -> T:
            if not self.marked:
                pytest.fail("this test starts ranks or a command: mark it with pytest.mark.pool")
            return start(*args, **options)

        return checked


guard = _Guard()
forkserver.start = guard(forkserver.start)
processes.start = guard(processes.start)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Before the fixtures of a test are made: note whether it has the mark, and give it its cores.

    Of several processes each of the first ones has a core of its own for what needs one: a run that pins itself to the
    first core that it may use would share that one with the others' runs.
    """
    guard.marked = item.get_closest_marker("pool") is not None
    if OTHERS is not None:
        place = int(OTHERS.removeprefix("gw"))
        alone = not guard.marked and item.get_closest_marker("cores") is None and place < len(CORES)
        own = {CORES[place]} if alone else set(CORES)
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread.name), own)
    return (yield)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is there now and stays: modules, and thousands of tests."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, those that ask for time or pools, and one that waits before every two of them.

    So no process is left with a long file at the end, and where one waits the others have the cores.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def has(path: Path, mark: str) -> bool:
        return any(item.get_closest_marker(mark) for item in files[path])

    waiting = [path for path in files if has(path, "waits")]
    others = sorted(files.keys() - waiting, key=lambda path: (not has(path, "timeout"), not has(path, "pool"), path))
    for place, path in enumerate(waiting):
        others.insert(3 * place, path)
    items[:] = [item for path in others for item in files[path]]


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A process without a launcher, a world of one: all stages of a pipeline still run in it."""
    from mpdqn.mesh import World

    with World.open() as world:
        yield world
