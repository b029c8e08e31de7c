"""`Pipeline` on real stages: alone with all stages stacked, and on two ranks with real messages."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network, set_memory_format
from mpdqn.pipeline import runtime
from mpdqn.pipeline.runtime import Pipeline, Values, _flat
from mpdqn.pipeline.stage import Stage, build_stages
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.schedule import SCHEDULES, Action, ActionTable, action_table, lane_of_stages
from tests.distributed import run_ranks

FRAMES, ACTIONS, BATCH = (4, 44, 44), 5, 12
PASSES = {"T": "target", "D": "online"}
ORDERS = ("gpipe-1", "gpipe-4", "1f1b-1", "1f1b-4", "zb_h1-4", "zbv-1", "zbv-4", "interleaved_1f1b-4", "td1f1b-4")
WHOLE, HALVES, THIRDS, QUARTERS = (0, 11), (0, 6, 11), (0, 4, 8, 11), (0, 3, 5, 8, 11)


def network(memory_format: str = "contiguous") -> nn.Sequential:
    chain = make_network("nature", FRAMES, ACTIONS, fc=32, seed=3).double()
    set_memory_format(chain, memory_format)  # type: ignore[arg-type]
    return chain


def frames() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    obs, next_obs = (torch.randint(256, (BATCH, *FRAMES), dtype=torch.uint8, generator=draw) for _ in range(2))
    return obs, next_obs


class Built(NamedTuple):
    pipeline: Pipeline
    stages: list[Stage]
    mesh: Mesh
    table: ActionTable


def build(
    world: World,
    chain: nn.Sequential,
    boundaries: tuple[int, ...],
    m: int,
    schedule: str,
    *,
    stacked: bool = True,
    ahead: str = "",
    recompute: tuple[str, ...] = (),
) -> Built:
    virtual = SCHEDULES[schedule].virtual
    partition = Partition(boundaries=boundaries)
    p = partition.num_stages // virtual
    parallelism = Parallelism(pipeline=p, num_microbatches=m, schedule=schedule, virtual=virtual)
    if stacked:
        plan = Plan.stacked(partition, parallelism)
    else:
        plan = Plan.rectangular(partition, parallelism, lanes=lane_of_stages(schedule, p, virtual))
    mesh = Mesh(world, plan, "".join(PASSES))
    stages = build_stages(chain, partition, mesh.stages, FRAMES, BATCH // m, world.device)
    whole = [stage for stage, kind in enumerate(recompute) if kind == "all"]
    table = action_table(schedule, p, m, "".join(PASSES), ahead=ahead, recompute=whole)
    return Built(Pipeline(mesh, stages, table, PASSES, recompute), stages, mesh, table)


def run(
    built: Built,
    loss: Callable[[int, Tensor, Mapping[str, Tensor]], Tensor],
    table: ActionTable | None = None,
    **options: Any,
) -> tuple[Stopwatch, Values]:
    """One step of ``table``, by default the one that the pipeline was built for."""
    pipeline, mesh = built.pipeline, built.mesh
    watch = Stopwatch(mesh.rank, mesh.device)
    obs, next_obs = frames()
    given = {"F": obs, "T": next_obs, "D": next_obs} if 0 in mesh.stages else {}
    values = pipeline.run(pipeline.program(table or built.table), given, loss, watch, **options)
    watch.stop()
    return watch, values


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


def layouts() -> Iterator[tuple[str, tuple[int, ...], int]]:
    for boundaries, m in ((WHOLE, 3), (HALVES, 1), (HALVES, 4), (THIRDS, 1), (THIRDS, 2), (THIRDS, 12)):
        yield from ((name, boundaries, m) for name, kind in SCHEDULES.items() if kind.virtual == 1)
    for boundaries, m in ((HALVES, 3), (QUARTERS, 1), (QUARTERS, 4)):
        yield from ((name, boundaries, m) for name, kind in SCHEDULES.items() if kind.virtual == 2)


@pytest.mark.parametrize(("schedule", "boundaries", "m"), [*layouts()])
def test_stacked_stages_compute_what_the_network_computes(
    alone: World, schedule: str, boundaries: tuple[int, ...], m: int
) -> None:
    """m below p included: then some ranks of a real pipeline have little to do."""
    chain = network()
    built = build(alone, chain, boundaries, m, schedule)
    told: list[Action] = []
    watch, ahead = run(built, loss_of, after=told.append)
    found = {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
    assert list(found) == [name for name, _ in chain.named_parameters()]
    assert distance(found, plain_gradients(chain, m)) < 1e-12
    assert ahead == {}
    marked = [Action(s.stage, s.kind, s.microbatch) for s in watch.timeline().spans]
    order = built.pipeline.program(built.table).order
    assert marked == told == list(order), "a span for each action, in the table's order"
    assert set(order) == built.table.actions


@pytest.mark.parametrize("recompute", ["boundaries", "all"])
@pytest.mark.parametrize("schedule", ["1f1b", "tdzb", "zbv"])
def test_recomputation_changes_no_bit(alone: World, schedule: str, recompute: str) -> None:
    """What is computed again is what was computed: the same layers on the same memory in the same order."""
    found = []
    for kind in ("none", recompute):
        chain = network()
        built = build(alone, chain, QUARTERS, 4, schedule, recompute=(kind,) * 4)
        run(built, loss_of)
        found.append({name: p.grad for name, p in chain.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputation_keeps_no_graph_and_runs_forward_again(alone: World) -> None:
    built = build(alone, network(), THIRDS, 4, "1f1b", recompute=("none", "boundaries", "all"))
    calls: Counter[tuple[int, bool]] = Counter()
    layers: Counter[int] = Counter()

    def count(stage: Stage) -> None:
        stage.online.register_forward_pre_hook(lambda *_: calls.update([(stage.index, torch.is_grad_enabled())]))
        stage.online[0].register_forward_pre_hook(lambda *_: layers.update([stage.index]))

    for stage in built.stages:
        count(stage)
    run(built, loss_of)
    passes = {(j, False): 4 for j in range(3)}  # D
    assert calls == {**passes, (0, True): 4, (2, True): 4}, "layers are called one by one in stage 1"
    assert layers == {0: 8, 1: 12, 2: 8}, "D and F; D, F and once more inside its backward; D and R: nobody waits for F"


@pytest.mark.parametrize("schedule", ["td1f1b", "tdzb"])
def test_passes_over_the_next_batch_are_handed_back_and_taken(alone: World, schedule: str) -> None:
    """T of the next batch in this step's gaps, or alone in front of the next step: the same values."""
    chain = network()
    built = build(alone, chain, THIRDS, 4, schedule, ahead="T")
    assert (built.table.passes, built.table.ahead) == ("D", "T")
    with torch.no_grad():
        expected = chain(frames()[1]).chunk(4)
    _, alone_first = run(built, refused, built.table.only_ahead())
    _, ahead = run(built, loss_of, known=alone_first)
    for values in (alone_first, ahead):
        assert sorted(values) == ["T"]
        for i in range(4):
            torch.testing.assert_close(values["T"][i], expected[i], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(ahead["T"][i], alone_first["T"][i]) for i in range(4))
    assert sorted(alone_first["T"]) == [0, 1, 2, 3], "what was handed over is left as it was"
    _, none = run(built, loss_of, built.table.without_ahead(), known=ahead)
    assert none == {}
    found = {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
    once = plain_gradients(chain, 4)
    assert distance(found, {name: 2 * g for name, g in once.items()}) < 1e-12


def refused(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    raise AssertionError("passes without gradient have no loss")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_of_a_stage_are_whole_after_the_action_that_completes_it(alone: World, schedule: str) -> None:
    """Not one action earlier: there the exchange begins."""
    chain = network()
    ahead = "T" if SCHEDULES[schedule].filled else ""
    built = build(alone, chain, QUARTERS, 3, schedule, ahead=ahead)
    known = run(built, refused, built.table.only_ahead())[1]
    completes = built.pipeline.program(built.table).completes
    done: Counter[int] = Counter()
    whole: dict[int, dict[str, Tensor]] = {}

    def after(action: Action) -> None:
        done[action.stage] += action.kind in "BW"
        if action in completes:
            assert completes[action] == action.stage
            assert done[action.stage] == 3
            gradients = built.stages[action.stage].named_parameters()
            whole[action.stage] = {n: p.grad.clone() for n, p in gradients if p.grad is not None}

    run(built, loss_of, known=known, after=after)
    assert sorted(whole) == [0, 1, 2, 3]
    found = {name: gradient for stage in sorted(whole) for name, gradient in whole[stage].items()}
    assert distance(found, plain_gradients(chain, 3)) < 1e-12


def test_gradients_are_added_to_those_that_are_there(alone: World) -> None:
    chain = network()
    built = build(alone, chain, HALVES, 4, "1f1b")
    for _ in range(3):
        run(built, loss_of)
    found = {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
    once = plain_gradients(chain, 4)
    assert distance(found, {name: 3 * g for name, g in once.items()}) < 1e-12


def test_each_stage_runs_once_for_each_pass_and_micro_batch(alone: World) -> None:
    """Shapes are told, not asked: no forward happens but those of the table, and none in the first step more."""
    chain = network()
    built = build(alone, chain, THIRDS, 4, "gpipe")
    calls: Counter[tuple[int, str, bool]] = Counter()

    def count(stage: Stage, which: str) -> Callable[..., None]:
        return lambda *_: calls.update([(stage.index, which, torch.is_grad_enabled())])

    for stage in built.stages:
        stage.online.register_forward_pre_hook(count(stage, "online"))
        stage.target.register_forward_pre_hook(count(stage, "target"))
    for steps in (1, 2):
        run(built, loss_of)
        expected = {
            (j, which, grad): 4 * steps for j in range(3) for which, grad in (("online", True), ("online", False))
        }
        assert calls == expected | {(j, "target", False): 4 * steps for j in range(3)}


def test_the_passes_see_their_own_network_and_no_gradient(alone: World) -> None:
    chain = network()
    built = build(alone, chain, HALVES, 3, "1f1b")
    with torch.no_grad():
        for stage in built.stages:
            for p in stage.online.parameters():
                p.mul_(1.5)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        assert q.requires_grad
        assert not values["T"].requires_grad
        assert not values["D"].requires_grad
        seen[i] = (q.detach(), values["T"].clone(), values["D"].clone())
        return loss_of(i, q, values)

    run(built, keep)
    obs, next_obs = frames()
    with torch.no_grad():
        q, d = chain(obs), chain(next_obs)
        t = next_obs
        for stage in built.stages:
            t = stage.target(t)
    for k, whole in enumerate((q, t, d)):
        torch.testing.assert_close(torch.cat([seen[i][k] for i in range(3)]), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(t, d)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_nothing_of_a_step_is_kept(alone: World, schedule: str, recompute: str) -> None:
    built = build(alone, network(), QUARTERS, 4, schedule, recompute=(recompute,) * 4)
    run(built, loss_of)
    for runner in built.pipeline._runners.values():
        assert not runner.fwd_cache
        assert not runner.bwd_cache
        assert not runner.output_chunks
        assert not runner.backward_state


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_no_activation_outlives_its_step(alone: World, schedule: str, recompute: str) -> None:
    """Stages of one process hand their activations to one another. Those of the last step stayed alive until the next
    step put others in their place: three passes times m boundaries at each cut."""
    built = build(alone, network(), QUARTERS, 4, schedule, recompute=(recompute,) * 4)
    crossing: list[weakref.ref[Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        crossing.append(weakref.ref(inputs[0]))

    for stage in built.stages[1:]:
        stage.online.register_forward_pre_hook(keep)
        stage.target.register_forward_pre_hook(keep)
    run(built, loss_of)
    assert len(crossing) == 3 * 3 * 4 + (2 * 4 if recompute == "all" else 0), "the last stage runs no F before its R"
    assert [tensor for tensor in crossing if tensor() is not None] == []


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


# Failures


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_error_says_in_which_action(alone: World, schedule: str) -> None:
    """And is the layer's own, not that of torch's stage around it."""
    built = build(alone, network(), QUARTERS, 4, schedule)
    own = ZeroDivisionError("of my own")
    built.stages[1].target.register_forward_pre_hook(failing(own))
    with pytest.raises(ZeroDivisionError, match="of my own") as caught:
        run(built, loss_of)
    assert caught.value is own
    assert caught.value.__notes__ == [f"in 1T0 (stage, kind, micro-batch) of {schedule}"]


def test_an_error_in_the_loss_or_in_backward_says_in_which_action(alone: World) -> None:
    def loss(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if i == 2:
            raise ZeroDivisionError("in the loss")
        q.register_hook(failing(KeyError("in backward")))
        return q.sum()

    for schedule, error, action in (
        ("gpipe", ZeroDivisionError, "3F2"),
        ("1f1b", KeyError, "3B0"),
        ("zbv", KeyError, "3I0"),
    ):
        built = build(alone, network(), QUARTERS, 4, schedule)
        with pytest.raises(error) as caught:
            run(built, loss)
        assert caught.value.__notes__ == [f"in {action} (stage, kind, micro-batch) of {schedule}"]


class Halved(nn.Module):
    """Drops half of the features of one micro-batch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x[:, : x.shape[1] // 2] if self.calls == self.at else x


def test_a_stage_that_returns_another_shape_than_it_promised(alone: World) -> None:
    """The peer's buffer has the size that was agreed: what is longer or shorter must never be sent."""
    layers = list(network().named_children())
    chain = nn.Sequential(OrderedDict([*layers[:6], ("halved", Halved(at=6)), *layers[6:]]))
    built = build(alone, chain, (0, 7, 12), 4, "1f1b")
    halved = built.stages[0].online[-1]
    assert isinstance(halved, Halved)
    halved.calls = 0  # it was called when the pipeline was built; D will call it 4 times
    with pytest.raises(
        ValueError, match=r"stage 0 promised \[3, .*\] float64 for each micro-batch but returned \[3, "
    ) as caught:
        run(built, loss_of)
    assert caught.value.__notes__ == ["in 0F1 (stage, kind, micro-batch) of 1f1b"]


# Two ranks


class Empty(TorchDispatchMode):
    """Counts the bytes of the memory that is made without a value on the CPU."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided):
            self.bytes += made.nbytes * made.is_cpu
        return made


def two_ranks() -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with World.open() as world:
        for memory_format, order in itertools.product(("contiguous", "channels_last"), ORDERS):
            schedule, m = order.split("-")
            chain = network(memory_format)
            boundaries = QUARTERS if SCHEDULES[schedule].virtual == 2 else HALVES
            built = build(world, chain, boundaries, int(m), schedule, stacked=False)
            with Empty() as empty:
                Pipeline(built.mesh, built.stages, built.table, PASSES)
            copies = []

            def flat(tensor: Tensor, like: Tensor | None = None, copies: list[bool] = copies) -> Tensor:
                row = _flat(tensor, like)
                copies.append(row.data_ptr() != tensor.data_ptr())
                return row

            with patch.object(runtime, "_flat", flat):
                run(built, loss_of)
            own = {name: p.grad.clone() for stage in built.stages for name, p in stage.named_parameters()}
            sent = built.mesh.reset_bytes()
            found[f"{memory_format}-{order}"] = (
                distance(own, plain_gradients(chain, int(m))),
                sent,
                sum(copies),
                list(own),
                empty.bytes,
            )
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(two_ranks, num_ranks=2, timeout=240)


@pytest.mark.pool
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("order", ORDERS)
def test_two_ranks_compute_what_the_network_computes(two: list[dict[str, Any]], memory_format: str, order: str) -> None:
    """Also with m < p, and with activations and gradients that lie channels_last in their messages."""
    name = f"{memory_format}-{order}"
    virtual = SCHEDULES[order.split("-")[0]].virtual
    with torch.no_grad():
        activation = {cut: network()[:cut](frames()[0]).numel() * 8 for cut in (3, 5, 6, 8)}
    (first, sent, _, names, _), (last, returned, _, other_names, _) = (rank[name] for rank in two)
    assert max(first, last) < 1e-12
    assert sorted(names + other_names) == sorted(parameter for parameter, _ in network().named_parameters())
    if virtual == 1:
        assert (sent, returned) == (3 * activation[6], activation[6]), "three passes one way, one gradient back"
    elif order.startswith("zbv"):  # 0 -> 1, 1 -> 2 on one rank, 2 -> 3 back
        assert (sent, returned) == (3 * activation[3] + activation[8], activation[3] + 3 * activation[8])
    else:
        out, back = activation[3] + activation[8], activation[5]
        assert (sent, returned) == (3 * out + back, out + 3 * back)


@pytest.mark.pool
@pytest.mark.parametrize("order", ORDERS)
def test_there_is_a_buffer_for_what_arrives_and_for_nothing_else(two: list[dict[str, Any]], order: str) -> None:
    """They were made twice, and also where the neighbouring stage is in the same process."""
    (_, sent, _, _, buffers), (_, returned, _, _, other_buffers) = (rank[f"contiguous-{order}"] for rank in two)
    assert (buffers, other_buffers) == (returned, sent), "each rank receives what the other sends"


@pytest.mark.pool
def test_activations_travel_as_they_lie(two: list[dict[str, Any]]) -> None:
    """No activation is rearranged on its way: its strides were agreed when the stage was built."""
    for name in two[0]:
        assert two[0][name][2] == 0, name
