"""`Reduction` on real gloo ranks: whole gradients, loss and norm, and how far it goes without waiting."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpdqn.exchange.reduction import Reduction
from mpdqn.mesh import Mesh, World
from mpdqn.plan import Parallelism, Partition, Plan
from tests.distributed import run_ranks

SHAPES = {0: [(3, 2), (4,)], 1: [(5,)], 2: [(2, 2)], 3: [(6,), ()]}
LAYOUTS = {"dp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2xpp2": (2, 2, 1), "dp2xpp2v2": (2, 2, 2), "single": (1, 1, 1)}


def gradients(stage: int, replica: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(10 * stage + replica)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES[stage]]


def with_gradients(stages: tuple[int, ...], replica: int) -> dict[int, list[nn.Parameter]]:
    found: dict[int, list[nn.Parameter]] = {}
    for stage in stages:
        found[stage] = [nn.Parameter(torch.zeros_like(g)) for g in gradients(stage, replica)]
        for p, g in zip(found[stage], gradients(stage, replica), strict=True):
            p.grad = g
    return found


def reduce(mesh: Mesh, *, proceed: bool) -> dict[str, Any]:
    """The rank's number is its loss."""
    owned = with_gradients(mesh.stages, mesh.replica)
    asked = []

    def loss() -> Tensor:
        asked.append(len(asked))
        return torch.tensor(float(mesh.rank), dtype=torch.float64)

    reduction = Reduction(mesh, owned, loss)
    for stage in reversed(mesh.stages):
        reduction.proceed()
        assert not asked, "not before all stages were started"
        reduction.start(stage)
    patience = time.monotonic() + 30
    while proceed and not asked and time.monotonic() < patience:
        reduction.proceed()
        time.sleep(0.01)
    begun = bool(asked)
    total, norm = reduction.finish()
    grads = {stage: [p.grad for p in parameters] for stage, parameters in owned.items()}
    return {"loss": total, "norm": norm, "gradients": grads, "begun": begun, "asked": asked}


def on_four_ranks() -> dict[str, Any]:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    with World.open(timeout_s=60) as world:
        for name, (d, p, v) in LAYOUTS.items():
            layout = Parallelism(data=d, pipeline=p, virtual=v)
            mesh = Mesh(world, Plan.rectangular(Partition(boundaries=tuple(range(p * v + 1))), layout), "")
            for proceed in (False, True):
                if mesh.member:
                    seen[f"{name} {proceed}"] = reduce(mesh, proceed=proceed)
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_four_ranks, num_ranks=4)


@pytest.mark.pool
@pytest.mark.parametrize("proceed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_loss_and_the_norm_of_the_whole_batch(
    ranks: list[dict[str, Any]], layout: str, proceed: bool
) -> None:
    """Whether the sums were finished between other work or waited for at the end."""
    d, p, v = LAYOUTS[layout]
    whole = {s: [sum(parts) for parts in zip(*(gradients(s, r) for r in range(d)), strict=True)] for s in range(p * v)}
    norm = nn.utils.get_total_norm([g for stage in whole.values() for g in stage])
    members = [seen[f"{layout} {proceed}"] for seen in ranks if f"{layout} {proceed}" in seen]
    assert len(members) == d * p
    for seen in members:
        assert seen["loss"] == sum(range(d * p))
        torch.testing.assert_close(seen["norm"], norm)
        assert seen["begun"] is proceed
        assert seen["asked"] == [0]
        for stage, found in seen["gradients"].items():
            for gradient, expected in zip(found, whole[stage], strict=True):
                torch.testing.assert_close(gradient, expected)
