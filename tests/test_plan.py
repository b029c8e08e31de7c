"""The frozen values of `mpdqn.plan`: what they refuse, where they place stages, and that JSON keeps them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.plan import LayerCost, Parallelism, Partition, Plan, Profile

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
    p = partition.num_stages
    names = draw(st.permutations(range(d * p)))
    columns = [[names[r * p + draw(st.integers(0, p - 1))] for _ in range(p)] for r in range(d)]
    parallelism = Parallelism(
        data=d, pipeline=p, num_microbatches=draw(st.integers(1, 64)), schedule=draw(st.text(max_size=10))
    )
    return Plan(partition=partition, parallelism=parallelism, placement=tuple(zip(*columns, strict=True)))


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
    d, p = plan.parallelism.data, plan.parallelism.pipeline
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


@pytest.mark.parametrize("name", ["data", "pipeline", "num_microbatches"])
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
    with pytest.raises(ValueError, match=rf"has 4 stages, the parallelism p = {p} and the placement {rows} rows"):
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
