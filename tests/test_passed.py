"""Long tests in parts: the list of `--passed`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import passed

ROOT = Path(__file__).parents[1]

LIST = "results/list.jsonl"

TESTS = """
import os
import pytest

def test_a(): pass
def test_b(): assert "BROKEN" not in os.environ
def test_c(): pytest.skip("not here")
@pytest.fixture
def made(): assert "BROKEN" not in os.environ
def test_d(made): pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of two folders, as this one."""
    root = tmp_path / "checkout"
    for folder in ("mpdqn", "tests"):
        (root / folder).mkdir(parents=True)
        (root / folder / "about.txt").touch()
    (root / "pytest.ini").touch()
    (root / "tests" / "test_x.py").write_text(TESTS)
    passed.git(root, "init", "--quiet")
    commit(root)
    return root


def commit(checkout: Path) -> None:
    passed.git(checkout, "add", "--all")
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    passed.git(checkout, *who, "commit", "--quiet", "--message", "state")


def sitting(checkout: Path, *flags: str, **variables: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.passed"]
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(
        [*command, "--passed", LIST, *flags],
        cwd=checkout,
        env=own | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


def test_what_has_passed_is_left_out_and_what_failed_comes_again(checkout: Path) -> None:
    assert "1 failed, 1 passed, 1 skipped, 1 error" in sitting(checkout, BROKEN="1")
    assert "2 passed" in sitting(checkout)
    nothing_left = sitting(checkout)
    assert "4 deselected in" in nothing_left
    assert nothing_left.endswith("exit code 0")
    assert sitting(checkout, "-k", "test_a").endswith("exit code 0")
    assert sitting(checkout, "-k", "no_such_test").endswith("exit code 5")
    outcomes = list(passed.read(checkout / LIST))
    assert [outcome.outcome for outcome in outcomes].count("failed") == 2
    table = passed.summary(outcomes)
    assert "| tests/test_x.py | 3 | 0 | 1 | 0.0 |" in table
    assert passed.git(checkout, "rev-parse", "--short=12", "HEAD") in table


def test_other_code_is_tested_anew_and_other_files_change_nothing(checkout: Path) -> None:
    assert "3 passed, 1 skipped" in sitting(checkout)
    (checkout / "README").touch()
    commit(checkout)
    assert "4 deselected in" in sitting(checkout)
    (checkout / "mpdqn" / "new.txt").touch()
    assert "--passed lists tests of committed code, but this was changed:\n?? mpdqn/new.txt" in sitting(checkout)
    commit(checkout)
    assert "3 passed, 1 skipped" in sitting(checkout)


def test_the_half_line_of_a_sitting_that_was_killed(checkout: Path) -> None:
    sitting(checkout)
    path = checkout / LIST
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:40]]))
    assert len(list(passed.read(path))) == 2
    assert "2 deselected" in sitting(checkout)
    assert len({outcome.test for outcome in passed.read(path)}) == 4
    assert "4 deselected" in sitting(checkout)


def test_a_list_elsewhere_is_refused(checkout: Path) -> None:
    (checkout.parent / "list.jsonl").touch()
    assert "must lie in" in sitting(checkout, "--passed", "../list.jsonl")
