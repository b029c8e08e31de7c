"""`Pipeline` on real stages: alone with all stages stacked, and on two ranks with real messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network, set_memory_format
from mpdqn.pipeline import runtime
from mpdqn.pipeline.runtime import Pipeline, _flat
from mpdqn.pipeline.stage import Stage, build_stages
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.schedule.tables import action_table
from tests.distributed import run_ranks

FRAMES, ACTIONS, BATCH = (4, 44, 44), 5, 12
PASSES = {"T": "target", "D": "online"}
WHOLE, HALVES, THIRDS = (0, 11), (0, 6, 11), (0, 4, 8, 11)


def network(memory_format: str = "contiguous") -> nn.Sequential:
    chain = make_network("nature", FRAMES, ACTIONS, fc=32, seed=3).double()
    set_memory_format(chain, memory_format)  # type: ignore[arg-type]
    return chain


def frames() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = (torch.randint(256, (BATCH, *FRAMES), dtype=torch.uint8, generator=draw) for _ in range(2))
    return obs, next_obs


def build(
    world: World, chain: nn.Sequential, boundaries: tuple[int, ...], m: int, schedule: str, *, stacked: bool = True
) -> tuple[Pipeline, list[Stage], Mesh]:
    partition = Partition(boundaries=boundaries)
    parallelism = Parallelism(pipeline=partition.num_stages, num_microbatches=m, schedule=schedule)
    mesh = Mesh(world, (Plan.stacked if stacked else Plan.rectangular)(partition, parallelism), "".join(PASSES))
    stages = build_stages(chain, partition, mesh.stages, FRAMES, BATCH // m, world.device)
    table = action_table(schedule, partition.num_stages, m, "".join(PASSES))
    return Pipeline(mesh, stages, table, PASSES, m), stages, mesh


def run(pipeline: Pipeline, mesh: Mesh, loss: Callable[[int, Tensor, Mapping[str, Tensor]], Tensor]) -> Stopwatch:
    watch = Stopwatch(mesh.rank, mesh.device)
    obs, next_obs = frames() if 0 in mesh.stages else (None, None)
    pipeline.run(obs, next_obs, loss, watch)
    watch.stop()
    return watch


def loss_of(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Any loss that needs all three passes and tells micro-batches apart."""
    return (1 + i) * (q * values["T"].sin() * values["D"].cos()).sum()


def plain_gradients(chain: nn.Sequential, m: int) -> dict[str, Tensor]:
    """The same without a pipeline."""
    chain.zero_grad(set_to_none=True)
    obs, next_obs = frames()
    for i, (now, later) in enumerate(zip(obs.chunk(m), next_obs.chunk(m), strict=True)):
        with torch.no_grad():
            value = chain(later)
        loss_of(i, chain(now), {"T": value, "D": value}).backward()
    return {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    squares = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return float((squares / sum(float(b[name].square().sum()) for name in a)) ** 0.5)


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A process without a launcher: all stages of a pipeline still run in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine a second one is waited for more than it helps
    with World.open() as world:
        yield world
    torch.set_num_threads(threads)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(
    ("boundaries", "m"), [(WHOLE, 3), (HALVES, 1), (HALVES, 4), (THIRDS, 1), (THIRDS, 2), (THIRDS, 12)]
)
def test_stacked_stages_compute_what_the_network_computes(
    alone: World, boundaries: tuple[int, ...], m: int, schedule: str
) -> None:
    """m below p included: then some ranks of a real pipeline have little to do."""
    chain = network()
    pipeline, _, mesh = build(alone, chain, boundaries, m, schedule)
    watch = run(pipeline, mesh, loss_of)
    found = {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
    assert list(found) == [name for name, _ in chain.named_parameters()]
    assert distance(found, plain_gradients(chain, m)) < 1e-12
    marked = [(s.stage, s.kind, s.microbatch) for s in watch.timeline().spans]
    assert marked == [tuple(action) for action in pipeline.order], "a span for each action, in the table's order"


def test_gradients_are_added_to_those_that_are_there(alone: World) -> None:
    chain = network()
    pipeline, _, mesh = build(alone, chain, HALVES, 4, "1f1b")
    for _ in range(3):
        run(pipeline, mesh, loss_of)
    found = {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
    once = plain_gradients(chain, 4)
    assert distance(found, {name: 3 * g for name, g in once.items()}) < 1e-12


def test_each_stage_runs_once_for_each_pass_and_micro_batch(alone: World) -> None:
    """Shapes are told, not asked: no forward happens but those of the table, and none in the first step more."""
    chain = network()
    pipeline, stages, mesh = build(alone, chain, THIRDS, 4, "gpipe")
    calls: Counter[tuple[int, str, bool]] = Counter()

    def count(stage: Stage, which: str) -> Callable[..., None]:
        return lambda *_: calls.update([(stage.index, which, torch.is_grad_enabled())])

    for stage in stages:
        stage.online.register_forward_pre_hook(count(stage, "online"))
        stage.target.register_forward_pre_hook(count(stage, "target"))
    for steps in (1, 2):
        run(pipeline, mesh, loss_of)
        expected = {
            (j, which, grad): 4 * steps for j in range(3) for which, grad in (("online", True), ("online", False))
        }
        assert calls == expected | {(j, "target", False): 4 * steps for j in range(3)}


def test_the_passes_see_their_own_network_and_no_gradient(alone: World) -> None:
    chain = network()
    pipeline, stages, mesh = build(alone, chain, HALVES, 3, "1f1b")
    with torch.no_grad():
        for stage in stages:
            for p in stage.online.parameters():
                p.mul_(1.5)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        assert q.requires_grad
        assert not values["T"].requires_grad
        assert not values["D"].requires_grad
        seen[i] = (q.detach(), values["T"].clone(), values["D"].clone())
        return loss_of(i, q, values)

    run(pipeline, mesh, keep)
    obs, next_obs = frames()
    with torch.no_grad():
        q, d = chain(obs), chain(next_obs)
        t = next_obs
        for stage in stages:
            t = stage.target(t)
    for k, whole in enumerate((q, t, d)):
        torch.testing.assert_close(torch.cat([seen[i][k] for i in range(3)]), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(t, d)


def test_nothing_of_a_step_is_kept(alone: World) -> None:
    pipeline, _, mesh = build(alone, network(), THIRDS, 4, "1f1b")
    run(pipeline, mesh, loss_of)
    for runner in pipeline._runners.values():
        assert not runner.fwd_cache
        assert not runner.bwd_cache
        assert not runner.output_chunks


def test_flat_is_the_memory_itself() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    for tensor in (x, last):
        row = _flat(tensor, torch.empty_like(tensor, device="meta"))
        assert row.shape == (120,)
        assert row.data_ptr() == tensor.data_ptr(), "no copy where the strides agree"
    assert torch.equal(_flat(last), x.permute(0, 2, 3, 1).reshape(-1))


def test_flat_brings_a_tensor_into_the_strides_that_were_agreed() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(_flat(x, last.to("meta")), _flat(last))
    assert torch.equal(_flat(last, x.to("meta")), _flat(x))
    buffer = torch.empty_like(last)
    _flat(buffer).copy_(_flat(x, last.to("meta")))
    assert torch.equal(buffer, x), "what arrives is what was sent"
    assert not _flat(x.requires_grad_(), last.to("meta")).requires_grad


# Two ranks


def two_ranks() -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with World.open() as world:
        for memory_format in ("contiguous", "channels_last"):
            for schedule, m in (("gpipe", 1), ("gpipe", 4), ("1f1b", 1), ("1f1b", 4)):
                chain = network(memory_format)
                pipeline, stages, mesh = build(world, chain, HALVES, m, schedule, stacked=False)
                copies = []

                def flat(tensor: Tensor, like: Tensor | None = None, copies: list[bool] = copies) -> Tensor:
                    row = _flat(tensor, like)
                    copies.append(row.data_ptr() != tensor.data_ptr())
                    return row

                with patch.object(runtime, "_flat", flat):
                    run(pipeline, mesh, loss_of)
                own = {name: p.grad.clone() for stage in stages for name, p in stage.named_parameters()}
                sent = mesh.reset_bytes()
                found[f"{memory_format}-{schedule}-{m}"] = (
                    distance(own, plain_gradients(chain, m)),
                    sent,
                    sum(copies),
                    list(own),
                )
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(two_ranks, num_ranks=2, timeout=240)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ["gpipe-1", "gpipe-4", "1f1b-1", "1f1b-4"])
def test_two_ranks_compute_what_the_network_computes(two: list[dict[str, Any]], memory_format: str, order: str) -> None:
    """Also with m < p, and with activations and gradients that lie channels_last in their messages."""
    name = f"{memory_format}-{order}"
    activation = network()[:6](frames()[0]).numel() * 8
    (first, sent, _, names), (last, returned, _, other_names) = (rank[name] for rank in two)
    assert max(first, last) < 1e-12
    assert names + other_names == [parameter for parameter, _ in network().named_parameters()]
    assert (sent, returned) == (3 * activation, activation), "three passes one way, one gradient back"


def test_activations_travel_as_they_lie(two: list[dict[str, Any]]) -> None:
    """No activation is rearranged on its way: its strides were agreed when the stage was built."""
    for name in two[0]:
        assert two[0][name][2] == 0, name
