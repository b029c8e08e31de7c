"""`Layout`: every written form, the way back to text, what it refuses, and the rows of the main job."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdqn.layouts import Layout, default_layouts
from mpdqn.plan import Partition
from mpdqn.schedule import SCHEDULES


def parse(text: str, cores: int = 2) -> Layout:
    return Layout.parse(text, cores=cores)


@pytest.mark.parametrize(
    ("text", "layout", "name"),
    [
        ("single", Layout(threads=2, share=2), "single@2"),
        ("single@1", Layout(threads=1, share=2), "single@1"),
        ("single@all/m8", Layout(threads=2, share=2, num_microbatches=8), "single@2/m8"),
        ("single/m4@1", Layout(threads=1, share=2, num_microbatches=4), "single@1/m4"),
        ("dp2", Layout(data=2), "dp2"),
        ("dp2@2", Layout(data=2, threads=2), "dp2@2"),
        ("pp2", Layout(pipeline=2, num_microbatches=8), "pp2-gpipe/m8"),
        ("pp2/m1", Layout(pipeline=2), "pp2-gpipe/m1"),
        ("pp2-1f1b/m4", Layout(pipeline=2, num_microbatches=4, schedule="1f1b"), "pp2-1f1b/m4"),
        (
            "pp2-1f1b+stacked",
            Layout(pipeline=2, num_microbatches=8, schedule="1f1b", stacked=True, threads=2, share=2),
            "pp2-1f1b+stacked/m8",
        ),
        ("dp2xpp2-gpipe/m8", Layout(data=2, pipeline=2, num_microbatches=8), "dp2xpp2-gpipe/m8"),
        (
            "dp2xpp3+stacked/m2",
            Layout(data=2, pipeline=3, num_microbatches=2, stacked=True),
            "dp2xpp3-gpipe+stacked/m2",
        ),
        ("pp2-zbv", Layout(pipeline=2, num_microbatches=8, schedule="zbv", virtual=2), "pp2-zbv/m8"),
        ("pp2-zbv+v2", Layout(pipeline=2, num_microbatches=8, schedule="zbv", virtual=2), "pp2-zbv/m8"),
        (
            "pp2-looped_bfs/m4+v3",
            Layout(pipeline=2, num_microbatches=4, schedule="looped_bfs", virtual=3),
            "pp2-looped_bfs+v3/m4",
        ),
        (
            "dp2xpp2-interleaved_1f1b+v1@2/m4",
            Layout(data=2, pipeline=2, num_microbatches=4, schedule="interleaved_1f1b", threads=2),
            "dp2xpp2-interleaved_1f1b+v1@2/m4",
        ),
        (
            "pp2-td1f1b+stacked",
            Layout(pipeline=2, num_microbatches=8, schedule="td1f1b", stacked=True, threads=2, share=2),
            "pp2-td1f1b+stacked/m8",
        ),
        ("2*single@1/m8", Layout(copies=2, num_microbatches=8), "2*single@1/m8"),
        ("1*single@1", Layout(threads=1, share=2), "single@1"),
        ("dp1xpp2/m2", Layout(pipeline=2, num_microbatches=2), "pp2-gpipe/m2"),
        ("dp1", Layout(threads=2, share=2), "single@2"),
    ],
)
def test_every_form(text: str, layout: Layout, name: str) -> None:
    parsed = parse(text)
    assert parsed == layout
    assert parsed.name == name
    assert parse(parsed.name) == parsed


@given(
    copies=st.integers(1, 3),
    d=st.integers(1, 5),
    p=st.integers(1, 5),
    schedule=st.sampled_from(("", *SCHEDULES)),
    virtual=st.sampled_from((None, 1, 2, 3)),
    stacked=st.booleans(),
    m=st.sampled_from((None, 1, 2, 8, 13)),
    threads=st.sampled_from((None, "all", 1, 2, 7)),
    cores=st.integers(1, 9),
)
def test_the_name_of_a_layout_means_that_layout(
    copies: int,
    d: int,
    p: int,
    schedule: str,
    virtual: int | None,
    stacked: bool,
    m: int | None,
    threads: int | str | None,
    cores: int,
) -> None:
    text = f"{copies}*" if copies > 1 else ""
    text += "single" if d == p == 1 else f"dp{d}" if p == 1 else f"pp{p}" if d == 1 else f"dp{d}xpp{p}"
    kind = SCHEDULES[schedule or "gpipe"]
    if virtual != kind.virtual and not kind.any_virtual:
        virtual = None
    text += f"-{schedule}" * bool(schedule) + "+stacked" * stacked
    text += "" if virtual is None else f"+v{virtual}"
    text += "" if m is None else f"/m{m}"
    text += "" if threads is None else f"@{threads}"
    allowed = (p > 1 or not (schedule or stacked)) and (copies == 1 or d == p == 1)
    if not allowed:
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            parse(text, cores)
        return
    layout = parse(text, cores)
    assert (layout.copies, layout.data, layout.pipeline, layout.stacked) == (copies, d, p, stacked)
    assert layout.num_microbatches == (m or (8 if p > 1 else 1))
    assert layout.virtual == (virtual or kind.virtual)
    assert layout.parallelism.num_stages == p * layout.virtual
    assert layout.ranks == copies * d * (1 if stacked else p)
    share = max(1, cores // layout.ranks)
    assert layout.threads == (share if threads is None else cores if threads == "all" else threads)
    assert parse(layout.name, cores) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no layout; write single@1, dp2, pp2-1f1b/m8 or dp2xpp2-gpipe/m8"),
        ("pipeline2", "'pipeline2' is no layout"),
        ("pp2xdp2", "'pp2xdp2' is no layout"),
        ("dp2 ", "'dp2 ' is no layout"),
        ("dp-2", "'dp-2' is no layout"),
        ("pp2/m", "'pp2/m' is no layout"),
        ("pp2-1f1", "unknown schedule '1f1'; did you mean '1f1b'? Known: gpipe, 1f1b"),
        ("pp2-td1f1", "unknown schedule 'td1f1'; did you mean 'td1f1b'? Known: gpipe, 1f1b"),
        ("pp2-zbv+v3", "zbv has exactly 2 stages on each rank, not 3; choose that or another schedule"),
        ("pp2-1f1b+v2", "1f1b has exactly 1 stages on each rank, not 2"),
        ("pp2-looped_bfs+v0", "looped_bfs has at least 1 stages on each rank, not 0"),
        ("dp2+v2", "gpipe has exactly 1 stages on each rank, not 2"),
        ("pp1-zbv", "'pp1-zbv': one stage has no schedule"),
        ("pp2-looped_bfs+v", "'pp2-looped_bfs+v' is no layout"),
        ("pp2-looped_bfs+v2+v3", "'pp2-looped_bfs+v2+v3' gives an option twice"),
        ("pp2-gpip/m8", "unknown schedule 'gpip'; did you mean 'gpipe'?"),
        ("dp0", "'dp0' has a count of 0; every count must be at least 1"),
        ("pp0", "'pp0' has a count of 0"),
        ("pp2/m0", "'pp2/m0' has a count of 0"),
        ("0*single", "'0*single' has a count of 0"),
        ("single@0", "'single@0' gives a rank 0 threads; give it at least 1"),
        ("2*dp2", "'2*dp2': only single processes can be copied, like 2*single@1"),
        ("2*pp2+stacked", "'2*pp2+stacked': only single processes can be copied"),
        ("dp2+stacked", "'dp2+stacked': one stage cannot be stacked; drop +stacked or write pp2+stacked"),
        ("dp2-1f1b", "'dp2-1f1b': one stage has no schedule; drop -1f1b or write pp2-1f1b"),
        ("pp2/m2/m4", "'pp2/m2/m4' gives an option twice; give each once"),
        ("single@1@all", "'single@1@all' gives an option twice"),
    ],
)
def test_what_is_no_layout(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


@pytest.mark.parametrize(
    ("text", "cores", "threads"),
    [
        *(("single", cores, cores) for cores in (1, 2, 8)),
        ("single@all", 8, 8),
        ("dp2", 1, 1),
        ("dp2", 8, 4),
        ("dp2xpp2", 8, 2),
        ("dp2xpp2", 2, 1),
        ("dp2xpp2+stacked", 8, 4),
        ("pp3", 8, 2),
        ("pp2@all", 8, 8),
        ("2*single", 8, 4),
    ],
)
def test_a_rank_has_an_equal_share_of_the_cores(text: str, cores: int, threads: int) -> None:
    assert parse(text, cores).threads == threads


def test_plans_place_every_stage() -> None:
    halves = Partition(boundaries=(0, 3, 5))
    (plan,) = parse("dp2xpp2/m4").plans(halves)
    assert (plan.placement, plan.parallelism.num_microbatches) == (((0, 2), (1, 3)), 4)
    (plan,) = parse("dp2xpp2+stacked/m4").plans(halves)
    assert plan.placement == ((0, 1), (0, 1))
    quarters = Partition(boundaries=(0, 1, 2, 3, 5))
    (plan,) = parse("pp2-looped_bfs").plans(quarters)
    assert plan.placement == ((0,), (1,), (0,), (1,)), "in turn"
    (plan,) = parse("dp2xpp2-zbv").plans(quarters, ("none", "all", "boundaries", "none"))
    assert plan.placement == ((0, 2), (1, 3), (1, 3), (0, 2)), "down and up again"
    assert plan.recompute == ("none", "all", "boundaries", "none")
    (plan,) = parse("pp2-zbv+stacked").plans(quarters)
    assert plan.placement == ((0,),) * 4
    plans = parse("3*single@1").plans(Partition(boundaries=(0, 5)))
    assert [plan.placement for plan in plans] == [((0,),), ((1,),), ((2,),)]


@pytest.mark.parametrize(
    ("text", "cores", "devices", "over"),
    [
        ("single@2", 2, 0, False),
        ("dp2", 2, 0, False),
        ("dp2@2", 2, 0, True),
        ("dp2xpp2", 2, 0, True),
        ("dp2xpp2", 4, 0, False),
        ("2*single@1", 1, 0, True),
        ("dp2", 16, 1, True),
        ("dp2", 1, 2, False),
        ("dp2xpp2+stacked", 16, 2, False),
        ("dp2xpp2", 16, 2, True),
    ],
)
def test_oversubscribed(text: str, cores: int, devices: int, over: bool) -> None:
    assert parse(text, cores).oversubscribed(cores, devices) == over


SINGLES = ["single@1", "single@1/m8"]
PAIRS = ["dp2", "pp2-gpipe/m8", "pp2-1f1b/m8", "pp2-td1f1b/m8"]
HYBRID = ["dp2xpp2-1f1b/m8"]
ALL_2 = ["single@2", "single@2/m8"]


@pytest.mark.parametrize(
    ("cores", "world_size", "names"),
    [
        (1, None, SINGLES + PAIRS + HYBRID),
        (2, None, SINGLES + ALL_2 + PAIRS + HYBRID),
        (8, None, [*SINGLES, "single@8", "single@8/m8", *PAIRS, *HYBRID]),
        (2, 1, SINGLES + ALL_2),
        (2, 2, SINGLES + ALL_2 + PAIRS),
        (2, 3, [*SINGLES, *ALL_2, *PAIRS, "pp3-gpipe/m8", "pp3-1f1b/m8", "pp3-td1f1b/m8"]),
        (2, 4, SINGLES + ALL_2 + PAIRS + HYBRID),
        (
            2,
            8,
            [
                *(*SINGLES, *ALL_2, *PAIRS, *HYBRID),
                *("dp4", "pp8-gpipe/m8", "pp8-1f1b/m8", "pp8-td1f1b/m8", "dp4xpp2-1f1b/m8"),
            ],
        ),
    ],
)
def test_default_layouts(cores: int, world_size: int | None, names: list[str]) -> None:
    assert [row.name for row in default_layouts(8, cores, 4, 0, world_size)] == names


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        (1, ["dp2", *(f"{row}+stacked/m8" for row in ("pp2-gpipe", "pp2-1f1b", "pp2-td1f1b", "dp2xpp2-1f1b"))]),
        (2, [*PAIRS, "dp2xpp2-1f1b+stacked/m8"]),
        (4, [*PAIRS, *HYBRID]),
    ],
)
def test_default_layouts_on_gpus(devices: int, names: list[str]) -> None:
    """No two stages in two processes on one GPU, which NCCL refuses, and no row of threads."""
    rows = default_layouts(8, 8, 4, devices)
    assert [row.name for row in rows] == ["single@8", "single@8/m8", *names]


@given(
    m=st.sampled_from((1, 2, 8)),
    cores=st.integers(1, 16),
    shards=st.integers(1, 12),
    devices=st.integers(0, 8),
    world_size=st.none() | st.integers(1, 12),
)
def test_default_layouts_always_fit(m: int, cores: int, shards: int, devices: int, world_size: int | None) -> None:
    rows = default_layouts(m, cores, shards, devices, world_size)
    assert len({row.name for row in rows}) == len(rows)
    assert sum(row.data == row.pipeline == 1 for row in rows) >= 1
    assert all(shards % row.data == 0 for row in rows)
    if world_size is not None and not devices:
        assert max(row.ranks for row in rows) == world_size, "torchrun's processes are all used"
    if world_size is None and devices:
        widest = max(row.ranks for row in rows)
        assert all(row.stacked or row.pipeline == 1 for row in rows) or widest <= devices


def test_no_micro_batches_no_second_row() -> None:
    names = [row.name for row in default_layouts(1, 2, 4)]
    pipelines = ["pp2-gpipe/m1", "pp2-1f1b/m1", "pp2-td1f1b/m1", "dp2xpp2-1f1b/m1"]
    assert names == ["single@1", "single@2", "dp2", *pipelines]
    assert replace(parse("dp2"), threads=2).name == "dp2@2"
