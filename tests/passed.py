"""`pytest --passed FILE`: long tests in parts. FILE lists what was run; what has passed with this code is left out.

    sitting 1   a b c ✗ …  killed       FILE: a passed, b passed, c failed
    sitting 2   c d e …                 FILE: …, c passed, d passed, e passed

The code is that of mpdqn/ and tests/ as git has it: after a change of either everything is run again.

python -m tests.passed FILE          a summary of the list, in markdown
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

CODE = ("mpdqn", "tests")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out of one test: ``outcome`` is passed, failed or skipped, ``at`` the time in UTC when it ended."""

    test: str
    outcome: str
    seconds: float
    at: str
    commit: str
    code: str


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def code_in(root: Path) -> str:
    """Return what names the code that is tested.

    Raises:
        pytest.UsageError: if it was changed since it was committed.
    """
    if changed := git(root, "status", "--porcelain", "--", *CODE):
        raise pytest.UsageError(f"--passed lists tests of committed code, but this was changed:\n{changed}")
    return "-".join(git(root, "rev-parse", "--short=12", f"HEAD:{folder}") for folder in CODE)


def read(path: Path) -> Iterator[Outcome]:
    """Return the outcomes in the list, in the order they came, without lines that were written in part."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield Outcome(**json.loads(line))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Give pytest the option."""
    text = "leave out what this list has, and add to it what is run: long tests in parts (tests/passed.py)"
    parser.addoption("--passed", type=Path, metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Read the list."""
    if (path := config.getoption("--passed")) is not None:
        root = Path(git(Path.cwd(), "rev-parse", "--show-toplevel"))
        # pytest takes every path that it is given for a place of tests, and names them from what these have in common.
        if config.rootpath != root:
            raise pytest.UsageError(f"--passed {path} must lie in {root}, or tests have other names")
        config.pluginmanager.register(Passed(path, root, writes="PYTEST_XDIST_WORKER" not in os.environ))


class Passed:
    """The plugin: leaves out what the list has, and adds to it; where several processes test, their first one does."""

    def __init__(self, path: Path, root: Path, writes: bool) -> None:
        self._path, self._writes, self._all_done = path, writes, False
        self._code, self._commit = code_in(root), git(root, "rev-parse", "--short=12", "HEAD")
        done = {outcome.test: outcome for outcome in read(path) if outcome.code == self._code}
        self._done = {test for test, outcome in done.items() if outcome.outcome != "failed"}

    @pytest.hookimpl(trylast=True)  # after -m and -k, which leave out others
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what the list has."""
        left_out = [item for item in items if item.nodeid in self._done]
        items[:] = [item for item in items if item.nodeid not in self._done]
        config.hook.pytest_deselected(items=left_out)
        self._all_done = bool(left_out) and not items

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Have a sitting that finds nothing left to run end well."""
        if self._all_done and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add to the list."""
        if not self._writes or (report.when != "call" and report.outcome == "passed"):
            return
        outcome = Outcome(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=self._commit,
            code=self._code,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":  # of a sitting that was killed
                file.write(b"\n")
            file.write(json.dumps(asdict(outcome)).encode() + b"\n")


def summary(outcomes: Iterable[Outcome]) -> str:
    """Return the last outcome of each test of the newest code, by file, in markdown."""
    everything = list(outcomes)
    newest = [outcome for outcome in everything if outcome.code == everything[-1].code]
    last = {outcome.test: outcome for outcome in newest}.values()
    kinds = ("passed", "failed", "skipped")
    rows = []
    for file in sorted({outcome.test.partition("::")[0] for outcome in last}):
        own = [outcome for outcome in last if outcome.test.startswith(f"{file}::")]
        count = Counter(outcome.outcome for outcome in own)
        rows.append([file, *(str(count[kind]) for kind in kinds), f"{sum(o.seconds for o in own) / 60:.1f}"])
    count = Counter(outcome.outcome for outcome in last)
    rows.append(["all", *(str(count[kind]) for kind in kinds), f"{sum(o.seconds for o in last) / 60:.1f}"])
    lines = [["file", *kinds, "minutes"], ["---"] + ["--:"] * 4, *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    commits = ", ".join(dict.fromkeys(outcome.commit for outcome in newest))
    return f"{table}\n\nCommit {commits}, from {newest[0].at} to {newest[-1].at}.\n"


if __name__ == "__main__":
    print(summary(read(Path(sys.argv[1]))), end="")
