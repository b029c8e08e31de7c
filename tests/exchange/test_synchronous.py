"""`SynchronousExchange` on real gloo ranks: exact sums, whatever the strides, the same everywhere and every time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpdqn.exchange import synchronous
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.mesh import Mesh, World
from mpdqn.plan import Parallelism, Partition, Plan
from tests.distributed import run_ranks

RANKS = 3
SKIPPED = 3
"""The parameter that has no gradient."""


def gradients(rank: int, dtype: torch.dtype, whole_numbers: bool) -> list[Tensor | None]:
    """One rank's gradients: contiguous, channels_last, transposed, none, a scalar, a large one."""
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> Tensor:
        if whole_numbers:  # sums of these are exact in any order
            return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=dtype)

    return [
        draw(4, 3, 2, 2),
        draw(4, 3, 5, 2).contiguous(memory_format=torch.channels_last),
        draw(6, 5).t(),
        None,
        draw(),
        draw(300),
        draw(7)[::2],
    ]


def parameters(rank: int, dtype: torch.dtype = torch.float64, whole_numbers: bool = True) -> list[nn.Parameter]:
    owned = []
    for index, gradient in enumerate(gradients(rank, dtype, whole_numbers)):
        # A gradient has its parameter's shape; its strides are its own.
        owned.append(nn.Parameter(torch.zeros(2 if index == SKIPPED else gradient.shape, dtype=dtype)))
        owned[-1].grad = gradient
    return owned


def plan_of(d: int, p: int) -> Plan:
    return Plan.rectangular(Partition(boundaries=tuple(range(p + 1))), Parallelism(data=d, pipeline=p))


def reduced(mesh: Mesh, owned: list[nn.Parameter]) -> dict[str, Any]:
    before = [p.grad for p in owned]
    exchange = SynchronousExchange(mesh)
    exchange.start(0, owned)
    exchange.finish()
    return {
        "done": exchange.done(),
        "sums": [None if p.grad is None else p.grad.clone() for p in owned],
        "kept": all(a is b.grad for a, b in zip(before, owned, strict=True)),
        "strides": [None if p.grad is None else p.grad.stride() for p in owned],
        "bytes": mesh.reset_bytes(),
    }


def overlapped(world: World, mesh: Mesh, owned: list[nn.Parameter]) -> dict[str, Any]:
    """Two stages, started one after the other; the last rank starts the second one late."""
    half, late, before = (
        len(owned) // 2,
        SynchronousExchange(mesh),
        [None if p.grad is None else p.grad.clone() for p in owned],
    )
    seen: dict[str, Any] = {"nothing under way": late.done()}
    late.start(0, owned[:half])
    world.barrier()
    if world.rank < world.size - 1:
        late.start(1, owned[half:])
        seen["waits"] = not late.done()
    world.barrier()
    seen["untouched"] = same([p.grad for p in owned], before)
    if world.rank == world.size - 1:
        late.start(1, owned[half:])
    late.finish()
    return seen | {"sums": [p.grad for p in owned], "done": late.done()}


def exchange() -> dict[str, Any]:
    with World.open(timeout_s=60) as world:
        rank, seen = world.rank, {}
        two, three = Mesh(world, plan_of(2, 1), ""), Mesh(world, plan_of(3, 1), "")
        alone = Mesh(world, plan_of(1, 1), "")
        if two.member:
            seen["two"] = reduced(two, parameters(rank))
            seen["two random"] = reduced(two, parameters(rank, whole_numbers=False))
        seen["three"] = reduced(three, parameters(rank))
        seen["random"] = [reduced(three, parameters(rank, whole_numbers=False)) for _ in range(3)]
        if alone.member:
            seen["alone"] = reduced(alone, parameters(rank))
        mixed = [p for dtype in (torch.float64, torch.float32) for p in parameters(rank, dtype)]
        seen["mixed"] = reduced(three, mixed)
        stages = Mesh(world, Plan.stacked(Partition(boundaries=(0, 1, 2)), Parallelism(data=3, pipeline=2)), "")
        seen["overlapped"] = overlapped(world, stages, parameters(rank))
        synchronous.BUCKET_BYTES = 100  # most of them alone, the small ones together
        seen["many buckets"] = reduced(three, parameters(rank))
        return seen


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(exchange, num_ranks=RANKS)


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(torch.equal(x, y) if x is not None and y is not None else x is y for x, y in zip(a, b, strict=True))


def expected(num_ranks: int, whole_numbers: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    columns = zip(*(gradients(rank, dtype, whole_numbers) for rank in range(num_ranks)), strict=True)
    return [None if parts[0] is None else torch.stack(parts).sum(dim=0) for parts in columns]


@pytest.mark.pool
@pytest.mark.parametrize(("case", "num_ranks"), [("two", 2), ("three", 3), ("many buckets", 3), ("alone", 1)])
def test_gradients_are_summed_exactly_whatever_their_strides(ranks: list[dict[str, Any]], case: str, num_ranks: int):
    for seen in ranks[:num_ranks]:
        assert same(seen[case]["sums"], expected(num_ranks))


@pytest.mark.pool
def test_two_replicas_sum_any_numbers_exactly(ranks: list[dict[str, Any]]):
    for seen in ranks[:2]:
        assert same(seen["two random"]["sums"], expected(2, whole_numbers=False))


@pytest.mark.pool
def test_all_ranks_have_the_same_bits_every_time(ranks: list[dict[str, Any]]):
    first = ranks[0]["random"][0]["sums"]
    for seen in ranks:
        for again in seen["random"]:
            assert same(again["sums"], first)
    for ours, theirs in zip(first, expected(3, whole_numbers=False), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.pool
def test_gradients_stay_in_place_and_keep_their_strides(ranks: list[dict[str, Any]]):
    strides = [None if g is None else g.stride() for g in gradients(0, torch.float64, True)]
    for seen in ranks:
        assert seen["three"]["kept"]
        assert seen["three"]["strides"] == strides


@pytest.mark.pool
def test_a_parameter_without_gradient_is_skipped_on_every_rank(ranks: list[dict[str, Any]]):
    assert all(seen["three"]["sums"][SKIPPED] is None for seen in ranks)


@pytest.mark.pool
def test_dtypes_do_not_mix(ranks: list[dict[str, Any]]):
    both = [*expected(3), *expected(3, dtype=torch.float32)]
    assert [g.dtype for g in both if g is not None] == [g.dtype for g in ranks[0]["mixed"]["sums"] if g is not None]
    assert all(same(seen["mixed"]["sums"], both) for seen in ranks)


@pytest.mark.pool
def test_sums_are_under_way_while_other_work_is_done(ranks: list[dict[str, Any]]):
    """Started stage by stage; until the end no gradient is touched, and it is known whether the end would wait."""
    for seen in (rank["overlapped"] for rank in ranks):
        assert seen["nothing under way"]
        assert seen.get("waits", True)
        assert seen["untouched"]
        assert seen["done"]
        assert same(seen["sums"], expected(RANKS))


@pytest.mark.pool
def test_the_bytes_of_a_ring_are_counted(ranks: list[dict[str, Any]]):
    numel = sum(g.numel() for g in gradients(0, torch.float64, True) if g is not None)
    assert [seen["two"]["bytes"] for seen in ranks[:2]] == [numel * 8] * 2
    assert [seen["three"]["bytes"] for seen in ranks] == [4 * numel * 8 // 3] * 3
    assert ranks[0]["alone"]["bytes"] == 0
