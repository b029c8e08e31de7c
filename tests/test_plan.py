"""The frozen values of `mpdqn.plan`: what they refuse, where they place stages, and that JSON keeps them."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.plan import RECOMPUTATION, LayerCost, Link, Parallelism, Partition, Plan, Profile

reproducible = settings(deadline=None, derandomize=True, database=None)
FOUR = Partition(boundaries=(0, 1, 3, 6, 7))


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    boundaries = [0]
    for length in lengths:
        boundaries.append(boundaries[-1] + length)
    return Partition(boundaries=tuple(boundaries))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any placement that is allowed: ranks in any order, some of them holding several stages of their replica."""
    partition, d = draw(partitions()), draw(st.integers(1, 4))
    stages = partition.num_stages
    virtual = draw(st.sampled_from([v for v in range(1, stages + 1) if stages % v == 0]))
    names = draw(st.permutations(range(d * stages)))
    columns = [[names[r * stages + draw(st.integers(0, stages - 1))] for _ in range(stages)] for r in range(d)]
    parallelism = Parallelism(
        data=d,
        pipeline=stages // virtual,
        num_microbatches=draw(st.integers(1, 64)),
        schedule=draw(st.text(max_size=10)),
        virtual=virtual,
    )
    mode = st.sampled_from(RECOMPUTATION)
    recompute = draw(st.just(()) | st.lists(mode, min_size=stages, max_size=stages).map(tuple))
    placement = tuple(zip(*columns, strict=True))
    return Plan(partition=partition, parallelism=parallelism, placement=placement, recompute=recompute)


times = st.floats(0, 1e9)
sizes = st.integers(0, 2**50)
layers = st.builds(
    LayerCost,
    name=st.text(),
    forward_ms=times,
    backward_input_ms=times,
    backward_weight_ms=times,
    parameter_bytes=sizes,
    activation_bytes=sizes,
    boundary_bytes=sizes,
)
profiles = st.builds(
    Profile,
    network=st.text(),
    batch_size=st.integers(1, 4096),
    device=st.text(),
    threads=st.integers(1, 256),
    memory_format=st.sampled_from(["contiguous", "channels_last"]),
    layers=st.lists(layers, max_size=6).map(tuple),
)


@reproducible
@given(plans())
def test_plan_json_both_ways(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)  # lists inside would not hash


@reproducible
@given(profiles)
def test_profile_json_both_ways(profile: Profile) -> None:
    again = Profile.from_json(profile.to_json())
    assert again == profile
    assert hash(again) == hash(profile)


@reproducible
@given(plans())
def test_every_stage_of_a_replica_lies_on_its_ranks(plan: Plan) -> None:
    d, p = plan.parallelism.data, plan.parallelism.num_stages
    assert plan.ranks == tuple(sorted({rank for index in range(d) for rank in plan.replica(index)}))
    for rank in plan.ranks:
        index = plan.replica_of(rank)
        assert plan.stages_of(rank) == tuple(j for j in range(p) if plan.replica(index)[j] == rank)
    assert sum(len(plan.stages_of(rank)) for rank in plan.ranks) == d * p


@reproducible
@given(partitions())
def test_stages_are_the_layers_in_order(partition: Partition) -> None:
    stages = [partition.layers_of(j) for j in range(partition.num_stages)]
    assert [layer for stage in stages for layer in stage] == list(range(partition.num_layers))


def test_times_of_a_profile_are_sums() -> None:
    layer = LayerCost(
        name="conv",
        forward_ms=1.0,
        backward_input_ms=2.0,
        backward_weight_ms=4.0,
        parameter_bytes=0,
        activation_bytes=0,
        boundary_bytes=0,
    )
    profile = Profile(
        network="two", batch_size=1, device="cpu", threads=1, memory_format="contiguous", layers=(layer, layer)
    )
    assert layer.backward_ms == 6.0
    assert (profile.forward_ms, profile.backward_ms) == (2.0, 12.0)


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FOUR.boundaries = (0, 1)  # type: ignore[misc]


@pytest.mark.parametrize("boundaries", [(), (0,), (1, 2), (0, 2, 2, 3), (0, 3, 2), (-1, 0, 2)])
def test_boundaries_that_do_not_rise(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"do not rise strictly from 0; each stage needs at least one layer") as error:
        Partition(boundaries=boundaries)
    assert str(boundaries) in str(error.value)


@pytest.mark.parametrize("name", ["data", "pipeline", "num_microbatches", "virtual"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 0 but must be at least 1"):
        Parallelism(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch_size", "nearest"), [(510, 512), (1, 32), (0, 32), (-3, 32), (47, 32), (49, 64), (1000, 992)]
)
def test_a_batch_that_does_not_divide(batch_size: int, nearest: int) -> None:
    parallelism = Parallelism(data=2, num_microbatches=16)
    with pytest.raises(ValueError, match=rf"batch_size {batch_size} is not a multiple of d·m = 2·16; try {nearest}$"):
        parallelism.check_batch(batch_size)
    parallelism.check_batch(nearest)


@pytest.mark.parametrize(("num_shards", "nearest"), [(4, 3), (1, 3), (0, 3), (8, 9)])
def test_shards_that_replicas_cannot_share(num_shards: int, nearest: int) -> None:
    parallelism = Parallelism(data=3)
    message = rf"{num_shards} virtual shards cannot be dealt to d = 3 replicas; try --num-shards {nearest}$"
    with pytest.raises(ValueError, match=message):
        parallelism.check_shards(num_shards, batch_size=720)
    parallelism.check_shards(nearest, batch_size=720)


def test_a_batch_that_shards_cannot_give() -> None:
    with pytest.raises(ValueError, match=r"batch_size 30 is not a multiple of the 4 virtual shards; try 32$"):
        Parallelism(data=2).check_shards(4, batch_size=30)
    Parallelism(data=2).check_shards(4, batch_size=32)


def test_rectangular_placement() -> None:
    plan = Plan.rectangular(Partition(boundaries=(0, 5, 9)), Parallelism(data=2, pipeline=2))
    assert plan.placement == ((0, 2), (1, 3))  # the drawing in the module
    assert (plan.replica(0), plan.replica(1)) == ((0, 1), (2, 3))
    assert plan.ranks == (0, 1, 2, 3)
    assert [plan.replica_of(rank) for rank in plan.ranks] == [0, 0, 1, 1]
    assert [plan.stages_of(rank) for rank in plan.ranks] == [(0,), (1,), (0,), (1,)]


def test_stacked_placement() -> None:
    plan = Plan.stacked(FOUR, Parallelism(data=2, pipeline=4))
    assert plan.ranks == (0, 1)
    assert (plan.replica(0), plan.replica(1)) == ((0, 0, 0, 0), (1, 1, 1, 1))
    assert [plan.stages_of(rank) for rank in (0, 1, 2)] == [(0, 1, 2, 3), (0, 1, 2, 3), ()]


def test_a_rank_that_takes_no_part() -> None:
    plan = Plan.stacked(FOUR, Parallelism(data=2, pipeline=4))
    with pytest.raises(ValueError, match=r"rank 2 is not among the ranks \(0, 1\) of this plan"):
        plan.replica_of(2)


@pytest.mark.parametrize(("p", "rows"), [(2, 4), (4, 3), (3, 3)])
def test_three_counts_of_stages_that_disagree(p: int, rows: int) -> None:
    with pytest.raises(ValueError, match=rf"has 4 stages, the parallelism p·v = {p} and the placement {rows} rows"):
        Plan(partition=FOUR, parallelism=Parallelism(pipeline=p), placement=((0,),) * rows)


def test_a_stage_on_too_many_ranks() -> None:
    with pytest.raises(ValueError, match=r"stage 1 is placed on 2 ranks \(1, 2\) but there are d = 1 replicas"):
        Plan(partition=FOUR, parallelism=Parallelism(pipeline=4), placement=((0,), (1, 2), (3,), (4,)))


def test_a_rank_in_two_replicas() -> None:
    with pytest.raises(ValueError, match=r"gives one rank to two replicas; a rank serves one replica"):
        Plan(
            partition=Partition(boundaries=(0, 1, 2)),
            parallelism=Parallelism(data=2, pipeline=2),
            placement=((0, 1), (1, 2)),
        )


def test_virtual_stages_are_dealt_to_the_ranks_in_turn_or_as_told() -> None:
    parallelism = Parallelism(data=2, pipeline=2, virtual=2)
    assert parallelism.num_stages == 4
    assert Parallelism(pipeline=3).num_stages == 3
    in_turn = Plan.rectangular(FOUR, parallelism)
    assert in_turn.placement == ((0, 2), (1, 3), (0, 2), (1, 3))
    assert [in_turn.stages_of(rank) for rank in in_turn.ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    v_shaped = Plan.rectangular(FOUR, parallelism, lanes=(0, 1, 1, 0))
    assert v_shaped.placement == ((0, 2), (1, 3), (1, 3), (0, 2))
    assert (v_shaped.replica(0), v_shaped.replica(1)) == ((0, 1, 1, 0), (2, 3, 3, 2))
    assert Plan.stacked(FOUR, parallelism).placement == ((0, 1),) * 4


def test_virtual_stages_that_disagree_with_the_partition() -> None:
    with pytest.raises(ValueError, match=r"has 4 stages, the parallelism p·v = 6 and the placement 6 rows"):
        Plan.rectangular(FOUR, Parallelism(pipeline=3, virtual=2))


def test_nothing_is_recomputed_unless_told() -> None:
    plan = Plan.rectangular(FOUR, Parallelism(pipeline=4))
    assert plan.recompute == ("none",) * 4
    modes = ("none", "all", "boundaries", "all")
    assert Plan.rectangular(FOUR, Parallelism(pipeline=4), recompute=modes).recompute == modes
    assert Plan.stacked(FOUR, Parallelism(pipeline=4), recompute=modes).recompute == modes
    assert plan == Plan.rectangular(FOUR, Parallelism(pipeline=4), recompute=("none",) * 4)


@pytest.mark.parametrize("modes", [("all",), ("none", "all", "some", "none"), ("none",) * 5])
def test_recomputation_that_does_not_fit_the_stages(modes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"must name one of none, boundaries, all for each of 4 stages") as error:
        Plan.rectangular(FOUR, Parallelism(pipeline=4), recompute=modes)
    assert str(modes) in str(error.value)


def test_a_plan_written_before_virtual_stages_and_recomputation_still_reads() -> None:
    plan = Plan.rectangular(FOUR, Parallelism(data=2, pipeline=4, num_microbatches=8, schedule="1f1b"))
    data = json.loads(plan.to_json())
    del data["recompute"], data["parallelism"]["virtual"]
    assert Plan.from_json(json.dumps(data)) == plan


def test_a_link_is_free_unless_told() -> None:
    assert Link() == Link(latency_s=0.0, bytes_per_s=math.inf, posted_ahead=True)
    assert hash(Link(latency_s=1e-4)) != hash(Link())
