"""Cutting a network into pipeline stages: measure (`profile`), decide (`balance`), act (`split`).

    model ── profile ──▶ Profile ── balance ──▶ Partition ── split ──▶ the stages, parameter names kept

Three functions carry the names of their files, and importing a submodule binds its name in the package. So all three
files are imported here, at once: Python binds a submodule only when it first loads it, hence what is bound below stays
bound in every order of imports. That costs no torch, since each file imports torch when its function is called. To
reach another name of a file, import it from the file: ``from mpdqn.partition.balance import …``.
"""

from mpdqn.partition.balance import balance, balance_costs
from mpdqn.partition.counted import counted_profile
from mpdqn.partition.profile import profile
from mpdqn.partition.split import split

__all__ = ["balance", "balance_costs", "counted_profile", "profile", "split"]
