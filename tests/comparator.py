"""Compare a layout's trace with the single process's, and say which quantities exceed their bound.

Every rank compares what it holds, name by name; rank 0 joins the ranks of each replica:

    rank 0   {a, b} ┐   [1] together the ranks hold the names of the single process, each once
    rank 1   {c}    ┘   [2] error = √(Σ‖layout − single‖² / Σ‖single‖²) over all names; the worst update and replica

What cannot be compared has an infinite error: a name that only one side holds (however small its tensor), another
shape, a number that is not finite, and a quantity that is zero or absent in the single process.
"""

from __future__ import annotations

import math
import sys

import torch

from mpdqn.mesh import World
from tests.transparency import Case, Tensors, Trace

FLOAT64_BOUND = 1e-10
FLOAT32_BOUND = 5e-5
QUANTITIES = ("gradients", "change", "norms", "losses", "td_errors", "priorities")

Squares = dict[str, tuple[float, float]]
"""By name: ‖layout − single‖² and ‖single‖²."""


def errors(world: World, case: Case, trace: Trace, reference: Trace) -> dict[str, float]:
    """Return each quantity's largest relative error over updates and replicas on rank 0, {} elsewhere. Collective."""
    own: dict[str, list[Squares]] = {}
    if trace.replica >= 0:
        own = {
            "gradients": [_squares(a, b) for a, b in zip(trace.gradients, reference.gradients, strict=True)],
            "change": [_squares(trace.change, reference.change)],
            "norms": [_squares(_numbers(trace.norms), _numbers(reference.norms))],
            "losses": [_squares(_numbers(trace.losses), _numbers(reference.losses))],
        }
    rows = {"td_errors": trace.td_errors, "priorities": trace.priorities}
    ranks = [part for part in world.to_first((trace.replica, own, rows)) if part[0] >= 0]
    if not ranks:
        return {}
    found: dict[str, float] = {}
    names = {"gradients": [sorted(own) for own in reference.gradients], "change": [sorted(reference.change)]}
    for quantity, wanted in names.items():
        by_update = [
            max(
                _error([squares[quantity][update] for r, squares, _ in ranks if r == replica], expected)
                for replica in range(case.data)
            )
            for update, expected in enumerate(wanted)
        ]
        found |= {quantity: max(by_update), f"first_{quantity}": by_update[0]}
    for quantity in ("norms", "losses"):
        found[quantity] = max(_error(squares[quantity], [""]) for _, squares, _ in ranks)
    for quantity, single in (("td_errors", reference.td_errors), ("priorities", reference.priorities)):
        joined = [
            torch.cat(parts) for parts in zip(*(own[quantity] for _, _, own in ranks if own[quantity]), strict=True)
        ]
        by_update = [_error([_squares({"": a}, {"": b})], [""]) for a, b in zip(joined, single, strict=True)]
        needed = quantity == "td_errors" or case.prioritized
        found[quantity] = max(by_update, default=math.inf if needed else 0.0)
    return found


def violations(case: Case, found: dict[str, float]) -> list[str]:
    """List the quantities that exceed the bound of the case's dtype; in float32 only the first gradients have one."""
    if case.dtype == "float64":
        bounds = dict.fromkeys(QUANTITIES, FLOAT64_BOUND)
    else:
        bounds = {"first_gradients": FLOAT32_BOUND} | dict.fromkeys(QUANTITIES, sys.float_info.max)
    return [f"{name} {found[name]:.1e} > {bound:.0e}" for name, bound in bounds.items() if not found[name] <= bound]


def _squares(a: Tensors, b: Tensors) -> Squares:
    """Compare the tensors of ``a`` with those of ``b`` by name; one that ``b`` lacks has an infinite error."""
    found = {}
    for name, tensor in a.items():
        single = b.get(name)
        if single is None or single.shape != tensor.shape:
            found[name] = math.inf, 0.0
        else:
            size = float(single.double().square().sum())
            found[name] = float((tensor.double() - single.double()).square().sum()), size
    return found


def _error(parts: list[Squares], names: list[str]) -> float:
    """Join the ``parts`` of one replica, which must hold ``names``, each once: [1] and [2]. Never NaN."""
    if sorted(name for part in parts for name in part) != names:
        return math.inf
    difference, size = (sum(squares[k] for part in parts for squares in part.values()) for k in (0, 1))
    # Not max(): max(0.0, nan) is 0.0.
    if not (math.isfinite(difference) and 0.0 < size < math.inf):
        return math.inf
    return (difference / size) ** 0.5


def _numbers(values: list[float]) -> Tensors:
    return {"": torch.tensor(values, dtype=torch.float64)}
