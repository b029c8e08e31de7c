"""What works without the optional extras, and what is said where one is missing.

The packages are hidden from a fresh interpreter, and from the ranks that it starts, by a ``sitecustomize`` module: to
``import`` and to ``find_spec`` they are then as absent as packages that were never installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mpdqn import extras

ROOT = Path(__file__).parents[1]
# What the extras bring, and what comes with them and could be imported by mistake.
OPTIONAL = {module for modules in extras.EXTRAS.values() for module in modules} | {"pandas", "seaborn"}

NEEDS_MATPLOTLIB = {"mpdqn.bench.plots", "mpdqn.bench.gantt"}
NEEDS_ALE = {"mpdqn.environments.atari"}

# Each command as a user gives it, in one interpreter: the import of torch is paid once.
SCRIPT = """
import contextlib, importlib, io, json, pkgutil, sys
import mpdqn
from mpdqn.cli import main

failed = []
for module in pkgutil.walk_packages(mpdqn.__path__, "mpdqn."):
    if module.name not in ("mpdqn.__main__", "mpdqn.preload"):  # which is for another process
        try:
            importlib.import_module(module.name)
        except ImportError:
            failed.append(module.name)
answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:  # of --help
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps({"failed": failed, "answers": answers}))
"""


def without(hidden: set[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` in ``folder``, the packages ``hidden`` absent."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(hidden)!r}))\n")
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{site}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=240,
    )


REFUSED = {
    ("train",): "mpdqn train: environment 'pong' needs ale-py; pip install 'mpdqn[atari]'\n",
    ("train", "--env", "ALE/MsPacman-v5"): (
        "mpdqn train: environment 'ms_pacman' needs ale-py; pip install 'mpdqn[atari]'\n"
    ),
    ("compare",): "mpdqn compare: environment 'pong' needs ale-py; pip install 'mpdqn[atari]'\n",
    ("train", "--env", "highway"): (
        "mpdqn train: environment 'highway' needs highway-env and pygame-ce; pip install 'mpdqn[driving]'\n"
    ),
    ("train", "--env", "reacher"): (
        "mpdqn train: environment 'reacher' needs mujoco and imageio; pip install 'mpdqn[robot]'\n"
    ),
    ("train", "--env", "minatar-breakout", "--wandb"): (
        "mpdqn train: logging to Weights & Biases needs wandb; pip install 'mpdqn[wandb]'\n"
    ),
    ("curves", "--runs", "."): "mpdqn curves: drawing curves needs matplotlib; pip install 'mpdqn[plot]'\n",
}
TRAIN = (
    *("train", "--env", "minatar-breakout", "--frames", "1600", "--min-replay", "500", "--capacity", "1000"),
    *("--layout", "single@1", "--evaluation-episodes", "2"),
)
COMPARE = (
    *("compare", "--smoke", "--env", "minatar-breakout", "--network", "minatar", "--transitions", "64"),
    *("--layouts", "single@1"),
)


def run_folder(out: Path) -> Path:
    (folder,) = out.iterdir()
    return folder


def test_only_minatar_is_needed_to_train_and_compare_on_minatar(tmp_path: Path) -> None:
    helps = [("--help",), ("compare", "--help"), ("train", "--help"), ("evaluate", "--help"), ("curves", "--help")]
    commands = [*helps, *REFUSED, TRAIN, COMPARE]
    done = without(OPTIONAL - {"minatar"}, tmp_path, "-c", SCRIPT, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # after what the rank printed
    assert set(found["failed"]) == NEEDS_ALE | NEEDS_MATPLOTLIB
    answers = dict(zip(commands, found["answers"], strict=True))
    for command in helps:
        code, out, err = answers[command]
        assert (code, err) == (0, "")
        assert out.startswith("usage: mpdqn")
    for command, line in REFUSED.items():
        assert answers[command] == [2, "", line]
    code, out, err = answers[TRAIN]
    assert code == 0, err
    note = "no TensorBoard log: it needs tensorboard; pip install 'mpdqn[tensorboard]' (progress.csv has the same rows)"
    assert err.count(note) == 1
    folder = run_folder(tmp_path / "results" / "train")
    assert (folder / "progress.csv").is_file()
    assert not (folder / "tensorboard").exists()
    # The rank that was started by the comparison imports mpdqn without the extras, too.
    code, out, err = answers[COMPARE]
    assert code == 0, err
    folder = run_folder(tmp_path / "results" / "compare")
    short = folder.relative_to(tmp_path)
    note = f"no plots: they need matplotlib; pip install 'mpdqn[plot]', then mpdqn compare --render-only {short}\n"
    assert err.count(note) == 1
    written = {path.name for path in folder.iterdir()}
    assert {"table.md", "table.tex", "records.jsonl"} <= written
    assert not [name for name in written if name.endswith((".svg", ".png"))]
