"""What an import costs: the deciders leave torch alone, and TorchRL stays behind its wall.

Each check runs in a fresh interpreter, since this one has long imported everything. The contracts between the layers
are import-linter's: ``lint-imports --config setup.cfg``.
"""

import subprocess
import sys

import pytest

PURE = [
    "mpdqn",
    "mpdqn.plan",
    "mpdqn.timeline",
    "mpdqn.records",
    "mpdqn.randomness",
    "mpdqn.scores",
    "mpdqn.extras",
    "mpdqn.launched",
    "mpdqn.files",
    "mpdqn.schedule",
    "mpdqn.planner",
    "mpdqn.planner.costs",
    "mpdqn.planner.order",
    "mpdqn.planner.recompute",
    "mpdqn.planner.simulate",
    "mpdqn.partition",
    "mpdqn.partition.balance",
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", PURE)
def test_deciders_leave_torch_alone(module: str) -> None:
    heavy = "{'torch', 'torchrl', 'tensordict'}"
    assert run(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_partition_never_loads_torchrl() -> None:
    code = """
import sys
from mpdqn.partition import balance, profile, split
import torch
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(18, 2))
measured = profile(model, torch.rand(2, 1, 5, 5), repeats=1, warmup=0)
split(model, balance(measured, 2))
print(sorted({'torchrl', 'tensordict'} & set(sys.modules)))
"""
    assert run(code) == "[]"


def test_partition_gives_its_functions_in_every_order_of_imports() -> None:
    """Three functions carry the names of their submodules, and importing a submodule binds its name in the package."""
    code = """
import importlib, itertools, sys
modules = ['mpdqn.partition', 'mpdqn.partition.balance', 'mpdqn.partition.profile', 'mpdqn.partition.split']
for order in itertools.permutations(modules):
    for name in [name for name in sys.modules if name.startswith('mpdqn')]:
        del sys.modules[name]
    for name in order:
        importlib.import_module(name)
        from mpdqn.partition import balance, balance_costs, profile, split
        from mpdqn.partition.balance import balance as b, balance_costs as c
        from mpdqn.partition.profile import profile as p
        from mpdqn.partition.split import split as s
        assert (balance, balance_costs, profile, split) == (b, c, p, s), order
        assert all(type(f).__name__ == 'function' for f in (b, c, p, s)), order
assert 'torch' not in sys.modules
print('every order')
"""
    assert run(code) == "every order"
