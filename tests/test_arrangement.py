"""`Arrangement`: what follows from a layout and a profile, against closed forms and by hand."""

import math
import pickle
import re
from dataclasses import replace

import pytest

from mpdqn.arrangement import Arrangement, NothingFits, check_parameters, scaled
from mpdqn.dqn.agents import double_dqn, dqn
from mpdqn.layouts import Layout
from mpdqn.plan import LayerCost, Profile
from mpdqn.planner.costs import activation_bytes
from mpdqn.planner.simulate import peak_activations
from mpdqn.schedule import SCHEDULES

MIB = 2**20


def profile(layers: int = 4, batch_size: int = 2, **one: float) -> Profile:
    """Equal layers on a micro-batch of ``batch_size``: F = I = W = 1 ms, 1 MiB of each kind and no parameters."""
    layer = LayerCost(
        name="layer",
        forward_ms=1.0,
        backward_input_ms=1.0,
        backward_weight_ms=1.0,
        parameter_bytes=0,
        activation_bytes=MIB,
        boundary_bytes=MIB,
    )
    return Profile(
        network="equal layers",
        batch_size=batch_size,
        device="cpu",
        threads=1,
        memory_format="contiguous",
        layers=tuple(replace(layer, name=f"layer{k}", **one) for k in range(layers)),  # type: ignore[arg-type]
    )


def arranged(
    text: str,
    *,
    lookahead: int = 1,
    recompute: str = "none",
    memory_bytes: float = math.inf,
    measured: Profile | None = None,
    agent: str = "double_dqn",
) -> Arrangement:
    """Of ``text``, whose micro-batches have two rows, on one layer for each stage unless another is ``measured``."""
    layout = Layout.parse(text, cores=4)
    return Arrangement.of(
        layout,
        measured or profile(layout.parallelism.num_stages),
        {"dqn": dqn, "double_dqn": double_dqn}[agent](),
        batch_size=2 * layout.data * layout.num_microbatches,
        lookahead=lookahead,
        recompute=recompute,
        memory_bytes=memory_bytes,
    )


EVERY = [
    *(f"pp2-{schedule}" for schedule in SCHEDULES),
    *("single@1/m4", "2*single@1", "dp2", "dp2xpp2-zbv", "pp3-looped_bfs+v3", "pp2-tdzb+stacked"),
]


@pytest.mark.parametrize("recompute", ["none", "all", "auto"])
@pytest.mark.parametrize("text", EVERY)
def test_the_same_profile_gives_the_same_arrangement(text: str, recompute: str) -> None:
    """On every rank, which reads the profile from rank 0's text."""
    measured = profile(9)
    read = Profile.from_json(measured.to_json())
    first, second = (
        arranged(text, recompute=recompute, memory_bytes=64 * MIB, measured=given) for given in (measured, read)
    )
    assert first == second
    assert first.table.check().num_stages == first.layout.parallelism.num_stages
    assert first.table.num_microbatches == first.layout.num_microbatches
    assert set(first.table.passes + first.table.ahead) == {"T", "D"}
    assert {plan.partition for plan in first.plans} == {first.plans[0].partition}
    assert len(first.plans) == first.layout.copies
    assert first.plans[0].recompute == first.plans[-1].recompute


@pytest.mark.parametrize("text", ["pp2-gpipe/m4", "pp2-1f1b/m8", "pp3-1f1b/m4", "pp4-gpipe/m1"])
@pytest.mark.parametrize("agent", ["dqn", "double_dqn"])
def test_the_bubble_of_equal_stages(text: str, agent: str) -> None:
    """(p − 1)·(F + B) of waiting for m·((k + 1)·F + B) of work, whatever the schedule, GPipe or 1F1B."""
    arrangement = arranged(text, agent=agent)
    p, m, k = arrangement.layout.pipeline, arrangement.layout.num_microbatches, len(agent.split("_"))
    wait, work = (p - 1) * (1 + 2), m * ((k + 1) + 2)
    assert arrangement.bubble == pytest.approx(wait / (work + wait))


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (2, 8, 3), (4, 8, 2)])
def test_chunks_divide_the_bubble(p: int, m: int, v: int) -> None:
    """Interleaved 1F1B waits as long as 1F1B, in stages v times as short (Narayanan et al. 2021, §2.2)."""
    wait, work = (p - 1) * (1 + 2), m * v * (3 + 2)
    assert arranged(f"pp{p}-interleaved_1f1b+v{v}/m{m}").bubble == pytest.approx(wait / (work + wait))


def test_target_passes_of_the_next_batch_fill_the_bubble() -> None:
    plain, filled, searched = (arranged(f"pp2-{name}/m4") for name in ("1f1b", "td1f1b", "tdzb"))
    assert 0 < filled.bubble < plain.bubble
    assert searched.bubble == pytest.approx(0.0)


def test_the_bubble_does_not_know_of_unequal_layers() -> None:
    """Imbalance is another loss: the verdict tells the two apart."""
    measured = profile(2)
    slow = replace(measured.layers[1], forward_ms=3.0, backward_input_ms=3.0, backward_weight_ms=3.0)
    uneven = replace(measured, layers=(measured.layers[0], slow))
    assert arranged("pp2-1f1b/m4", measured=uneven).bubble == pytest.approx(arranged("pp2-1f1b/m4").bubble)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_in_one_process_and_single_ones_never_wait(schedule: str) -> None:
    assert arranged(f"pp2-{schedule}+stacked").bubble == 0.0
    assert arranged("single@1").bubble == 0.0
    assert arranged("dp2").bubble == 0.0


@pytest.mark.parametrize("text", EVERY)
def test_without_lookahead_nothing_runs_ahead(text: str) -> None:
    now, early = arranged(text, lookahead=0).table, arranged(text).table
    assert (now.ahead, set(now.passes)) == ("", {"T", "D"})
    filled = SCHEDULES[Layout.parse(text, cores=4).schedule].filled
    assert early.ahead == "T" * filled, "the online network of the next update is not known yet, so D never runs ahead"


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_times_and_sizes_are_in_proportion_to_the_micro_batch(rows: int) -> None:
    """The profile was measured on ``rows`` of them; the layout's micro-batches have two."""
    measured = profile(2, batch_size=rows)
    arrangement = arranged("pp2-1f1b", measured=measured)
    assert arrangement.times.seconds["F"] == pytest.approx((2 / rows * 1e-3,) * 2)
    assert arrangement.times.seconds["B"] == pytest.approx((2 / rows * 2e-3,) * 2)
    assert arrangement.plans == arranged("pp2-1f1b").plans, "the cut does not depend on it"
    micro = scaled(measured, 2)
    assert (micro.batch_size, scaled(micro, rows).batch_size) == (2, rows)
    assert micro.layers[0].parameter_bytes == measured.layers[0].parameter_bytes
    assert scaled(measured, rows) is measured


def test_a_simulated_timeline_is_of_the_first_replica() -> None:
    timeline = arranged("dp2xpp2-1f1b/m4").simulated(2, update_s=0.5)
    assert {span.rank for span in timeline.spans} == {0, 1}
    assert {span.step for span in timeline.spans} == {0, 1}
    assert timeline.busy(0, "optimizer") == pytest.approx(2 * 0.5)
    assert timeline.busy(1, "F") == pytest.approx(2 * 4 * 1e-3)


# Recomputation


def test_one_mode_for_every_stage() -> None:
    for mode in ("none", "boundaries", "all"):
        arrangement = arranged("pp2-1f1b", recompute=mode)
        assert arrangement.plans[0].recompute == (mode, mode)
        assert any(action.kind == "R" for action in arrangement.table.actions) == (mode == "all")
    assert arranged("2*single@1", recompute="all").plans[1].recompute == ("all",)


def peaks(arrangement: Arrangement, measured: Profile) -> list[float]:
    plan = arrangement.plans[0]
    kept, rebuilt = activation_bytes(measured, plan.partition, plan.recompute)
    return [peak_activations(lane, kept, rebuilt) for lane in arrangement.table.lanes]


@pytest.mark.parametrize("text", ["pp2-gpipe/m4", "pp2-1f1b/m4", "pp2-zbv/m4", "pp2-tdzb/m4", "single@1/m4"])
def test_auto_recomputes_as_much_as_it_takes_to_fit(text: str) -> None:
    measured = profile(8)
    free = arranged(text, recompute="auto", measured=measured)
    assert set(free.plans[0].recompute) == {"none"}, "all fits into no limit"
    most = max(peaks(free, measured))
    assert arranged(text, recompute="auto", memory_bytes=most, measured=measured) == free
    tight = arranged(text, recompute="auto", memory_bytes=0.8 * most, measured=measured)
    assert set(tight.plans[0].recompute) != {"none"}
    assert max(peaks(tight, measured)) <= 0.8 * most
    skipped = tight.plans[0].recompute[-1] == "all"  # the last stage then runs its forward once, as R
    end = -1 if skipped else None
    assert tight.times.seconds["F"][:end] == free.times.seconds["F"][:end]


def test_parameters_leave_less_for_activations() -> None:
    """Five copies of one MiB in each layer: a rank of two holds 20 MiB, one alone 40, stacked or not."""
    measured, heavy = profile(8), profile(8, parameter_bytes=MIB)
    for text, held in (("pp2-gpipe/m4", 20 * MIB), ("pp2-zbv/m4", 20 * MIB), ("single@1/m4", 40 * MIB)):
        free = arranged(text, recompute="auto", measured=measured)
        limit = 0.8 * max(peaks(free, measured))
        light = arranged(text, recompute="auto", memory_bytes=limit, measured=measured)
        assert arranged(text, recompute="auto", memory_bytes=limit + held, measured=heavy).plans == light.plans
    stacked = arranged("pp2-gpipe+stacked/m4", recompute="auto", memory_bytes=40 * MIB + 2 * limit, measured=heavy)
    assert max(peaks(stacked, heavy)) <= limit
    with pytest.raises(NothingFits, match=r"rank whose parameters.* at least 40\.0 MiB but its memory limit is 40\.0"):
        arranged("pp2-gpipe+stacked/m4", recompute="auto", memory_bytes=40 * MIB, measured=heavy)


def test_a_limit_that_nothing_meets_is_said_with_both_numbers() -> None:
    """One layer a stage: what runs it again builds its activations whole, next to its input."""
    with pytest.raises(ValueError, match=r".") as caught:
        arranged("pp2-1f1b/m4", recompute="auto", memory_bytes=MIB, measured=profile(2))
    message = str(caught.value)
    assert re.fullmatch(
        r"layout pp2-1f1b/m4 does not fit into 1\.0 MiB a rank, parameters included: the activations take at least "
        r"\d\.0 MiB on lane \d but its limit is 1\.0 MiB; use more .*",
        message,
    )
    assert type(caught.value) is NothingFits
    assert str(pickle.loads(pickle.dumps(caught.value))) == message, "it comes back from a worker"


def test_parameters_that_do_not_fit_are_said_with_both_numbers() -> None:
    heavy = profile(2, parameter_bytes=3 * MIB)
    with pytest.raises(NothingFits) as caught:
        arranged("pp2-1f1b/m4", recompute="auto", memory_bytes=10 * MIB, measured=heavy)
    assert str(caught.value) == (
        "layout pp2-1f1b/m4 has a rank whose parameters, their gradients, Adam's moments and the target network take "
        "at least 15.0 MiB but its memory limit is 10.0 MiB; raise it or use more stages"
    )
    check_parameters(Layout(), 3 * MIB, 15 * MIB + 1)
