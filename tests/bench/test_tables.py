"""A table says what its records say: medians and ratios worked out by hand, and text that LaTeX and markdown print."""

import re
from collections.abc import Mapping

import pytest

from mpdqn.bench.comparison import compare_table
from mpdqn.bench.rows import rows_of
from mpdqn.bench.tables import Summary, Table, decimals, latex_text, spread, summarize
from mpdqn.records import Environment, Record

ENVIRONMENT = Environment(
    commit="0123456789ab",
    versions={"python": "3.11.7", "torch": "2.14.1"},
    hardware="a CPU",
    cores=2,
    memory_gib=8.0,
    command="mpdqn compare --rounds 3",
)
MIB = 2**20


def record(
    row: str,
    step_s: float,
    round_: int = 0,
    *,
    settings: Mapping[str, object] | None = None,
    values: Mapping[str, object] | None = None,
) -> Record:
    """A record as `mpdqn compare` writes it; its row is one process on one thread unless ``settings`` say otherwise."""
    about = {
        **{"layout": row, "copies": 1, "data": 1, "pipeline": 1, "schedule": "gpipe", "num_microbatches": 1},
        **{"ranks": 1, "threads": 1, "stacked": False, "oversubscribed": False},
        **{"network": "resnet18", "environment": "pong", "batch_size": 64, "device": "cpu", "backend": "gloo"},
        **{"memory_format": "contiguous", "boundaries": "0-14", "agent": "double_dqn", "steps": 2},
        **{"frames_per_transition": 4, "virtual": 1, "lookahead": 1, "recompute": "none"},
        **(settings or {}),
    }
    ranks = about["ranks"]
    assert isinstance(ranks, int)
    measured = {
        **{"transitions_per_s": 64 / step_s, "step_s": step_s, "bubble_measured": 0.0, "bubble_simulated": 0.0},
        "late_pass_s": 0.0,
        **{"compute_s": [step_s] * ranks, "exchange_s": [0.0] * ranks, "optimizer_s": [0.0] * ranks},
        **{"bytes_sent": [0] * ranks, "peak_memory_bytes": [512 * MIB] * ranks},
        **{"gradient_error": 1.2e-7, "td_error_error": 3e-8},
        **(values or {}),
    }
    return Record(
        experiment="compare",
        row=row,
        round=round_,
        seed=0,
        settings=about,  # type: ignore[arg-type]
        values=measured,  # type: ignore[arg-type]
        environment=ENVIRONMENT,
    )


DP2 = {"data": 2, "ranks": 2}
PP2 = {"pipeline": 2, "ranks": 2, "num_microbatches": 8, "boundaries": "0-5-14"}


def column(table: Table, name: str) -> dict[str, str]:
    """The cells of column ``name``, by the first cell of their row."""
    return {row[0]: row[table.columns.index(name)] for row in table.rows}


def test_a_summary_is_median_lowest_and_highest() -> None:
    assert summarize([3.0, 1.0, 10.0]) == Summary(median=3.0, low=1.0, high=10.0)
    assert spread(Summary(median=123.44, low=120.06, high=125.0), 1) == "123.4 [120.1–125.0]"
    assert [decimals(v) for v in (0.5, 9.9, 10, 999, 1000)] == [2, 2, 1, 1, 0]


def test_the_notes_say_which_rows_were_computed_in_what() -> None:
    bf16, plain = {"precision": "bf16, compiled"}, {"precision": "float32"}
    same = compare_table([record("single@1", 1.0, settings=plain), record("dp2", 1.0, settings=DP2 | plain)])
    assert "(gloo, contiguous, float32), agent" in same.notes[0]
    each = compare_table([record("single@1", 1.0, settings=plain), record("dp2", 1.0, settings=DP2 | bf16)])
    assert "(gloo, contiguous; float32: single@1; bf16, compiled: dp2), agent" in each.notes[0]
    assert "(gloo, contiguous), agent" in compare_table([record("single@1", 1.0)]).notes[0], "as older versions wrote"


def test_a_target_refresh_is_priced_at_the_period_of_the_run() -> None:
    late = {"late_pass_s": 0.5}
    notes = compare_table([record("pp2", 1.0, settings=PP2 | {"target_period": 250}, values=late)]).notes
    assert any("one in 250 updates, that would be 2.0e-03 of the time" in note for note in notes)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_nothing_and_infinity_have_no_summary(values: list[float]) -> None:
    with pytest.raises(ValueError, match="has no median; measure"):
        summarize(values)


def test_the_ratio_is_the_median_of_the_ratios_within_the_rounds() -> None:
    # The machine is half as fast in round 1. dp2 / single: 100/100, 60/50, 120/100 -> 1.0, 1.2, 1.2, median 1.2;
    # the ratio of the medians would be 100/100 = 1.0.
    speeds = {"single@1": (100.0, 50.0, 100.0), "dp2": (100.0, 60.0, 120.0)}
    records = [
        record(name, 64 / speeds[name][r], r, settings=DP2 if name == "dp2" else None)
        for r in range(3)
        for name in speeds
    ]
    table = compare_table(records)
    assert column(table, "× best single") == {"single@1": "1.00 [1.00–1.00]", "dp2": "1.20 [1.00–1.20]"}
    assert column(table, "transitions/s")["dp2"] == "100.0 [60.0–120.0]"
    assert column(table, "frames/s")["dp2"] == "400.0"


def test_the_best_single_process_is_chosen_in_each_round_and_copies_are_not_one() -> None:
    records = [
        *(record("single@1", 64 / speed, r) for r, speed in enumerate((100, 80))),
        *(record("single@2", 64 / speed, r, settings={"threads": 2}) for r, speed in enumerate((50, 160))),
        *(record("2*single@1", 64 / 200, r, settings={"copies": 2, "ranks": 2}) for r in range(2)),
    ]
    table = compare_table(records)
    assert column(table, "× best single") == {
        "single@1": "0.75 [0.50–1.00]",
        "single@2": "0.75 [0.50–1.00]",
        "2*single@1 §": "1.62 [1.25–2.00]",
    }
    assert any(note.startswith("§ independent") for note in table.notes)


def test_without_a_single_process_there_is_no_ratio_and_the_table_says_so() -> None:
    table = compare_table([record("dp2", 1.0, settings=DP2)])
    assert column(table, "× best single") == {"dp2": "–"}
    assert any("no single process was measured" in note for note in table.notes)


def test_a_row_shows_what_was_measured_on_each_rank() -> None:
    pipeline = {
        **{"bubble_measured": 0.123, "bubble_simulated": 0.0667, "gradient_error": 2.34e-7},
        **{"bytes_sent": [3 * MIB, int(1.4 * MIB)], "peak_memory_bytes": [700 * MIB, 655 * MIB]},
    }
    hybrid = {"pipeline": 2, "data": 2, "ranks": 4, "oversubscribed": True, "stacked": True}
    table = compare_table(
        [
            record("single@1", 1.0, values={"gradient_error": None, "td_error_error": None}),
            record("pp2-1f1b/m8", 1.0, settings=PP2 | {"schedule": "1f1b"}, values=pipeline),
            record("dp2xpp2", 1.0, settings=hybrid, values={"bytes_sent": [MIB, 5 * MIB, 2 * MIB, MIB]}),
        ]
    )
    assert table.rows[1] == (
        *("pp2-1f1b/m8", "1f1b", "8", "2 × 1", "64.0 [64.0–64.0]", "256.0", "1.00 [1.00–1.00]"),
        *("12.3 %", "6.7 %", "3.0 / 1.4", "700 / 655", "2.3e-07"),
    )
    assert column(table, "grad. error")["single@1"] == "–"
    assert column(table, "bubble")["single@1"] == "–"
    assert column(table, "sent MiB") == {"single@1": "0", "pp2-1f1b/m8": "3.0 / 1.4", "dp2xpp2 †‡": "1.0–5.0"}
    assert column(table, "peak MiB")["dp2xpp2 †‡"] == "512"
    assert table.columns[7:9] == ("bubble", "simulated")
    notes = "\n".join(table.notes)
    for said in ("agent double_dqn, lookahead 1, recompute none; cut ", "cut 0-5-14 for p·v = 2", "0123456789ab"):
        assert said in notes
    for said in ("resnet18 on pong", "a CPU, 2 cores, 8 GiB", "torch 2.14.1"):
        assert said in notes
    for said in ("seed 0; 1 interleaved rounds × 2 steps", "† oversubscribed", "‡ all stages", "at most 3.0e-08"):
        assert said in notes


def test_rows_of_other_cuts_and_recomputation_are_all_named() -> None:
    looped = {"virtual": 2, "boundaries": "0-3-5-9-14", "recompute": "none-all-none-none"}
    table = compare_table(
        [
            record("single@1", 1.0),
            record("pp2-1f1b/m8", 1.0, settings=PP2),
            record("pp2-zbv/m8", 1.0, settings=PP2 | looped),
        ]
    )
    assert table.notes[0].startswith("resnet18 on pong")
    assert table.notes[0].endswith(
        "lookahead 1, recompute none / none-all-none-none; cut 0-3-5-9-14 for p·v = 4, cut 0-5-14 for p·v = 2"
    )


def test_a_gradient_error_that_is_no_number_is_not_hidden() -> None:
    errors = (1e-7, float("nan"), 1e-6)
    table = compare_table(
        [record("dp2", 1.0, r, settings=DP2, values={"gradient_error": e}) for r, e in enumerate(errors)]
    )
    assert column(table, "grad. error") == {"dp2": "nan"}


def test_markdown_is_aligned_and_fits_a_terminal() -> None:
    records = [record("single@1", 1.0), record("dp2xpp2-1f1b/m8", 2.0, settings=DP2 | PP2 | {"oversubscribed": True})]
    lines = compare_table(records).markdown().splitlines()
    grid = [line for line in lines if line.startswith("|")]
    assert len(grid) == 4
    assert len({len(line) for line in grid}) == 1
    assert max(map(len, lines)) <= 170


def test_markdown_prints_its_own_characters_as_they_are() -> None:
    table = Table(title="t", columns=("a", "b"), rows=(("x|y", "1"), ("2*s", "–")), notes=("2*s and 3*s",))
    assert table.markdown().splitlines() == [
        *("### t", "", "| a    |   b |", "| ---- | --: |", r"| x\|y |   1 |", "| 2*s  |   – |", "", r"- 2\*s and 3\*s"),
    ]


def test_latex_escapes_every_special_character() -> None:
    assert latex_text(r"50 % of a_b & {c} #1 $2 \d ~e ^f") == (
        r"50 \% of a\_b \& \{c\} \#1 \$2 \textbackslash{}d \textasciitilde{}e \textasciicircum{}f"
    )
    assert latex_text("a < b | c > d") == r"a \textless{} b \textbar{} c \textgreater{} d"
    assert latex_text("2 × α – é") == r"2 \ensuremath{\times} \ensuremath{\alpha} -- é"
    assert latex_text("--rounds") == "-{}-rounds"
    assert latex_text("‖a − b‖₂") == r"\ensuremath{\|}a \ensuremath{-} b\ensuremath{\|}\ensuremath{_2}"
    assert latex_text("ﬁ 漢") == "fi ?"


def test_a_latex_table_has_the_structure_that_latex_needs() -> None:
    table = Table(title="50 % & more", columns=("a", "b"), rows=(("[x", "1"), ("y_1", "2.5")), notes=("#1", "2"))
    text = table.latex()
    lines = text.splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert body == [r"{}[x & 1 \\", r"y\_1 & 2.5 \\"]  # \\ would take a bracket for its argument
    assert r"\begin{tabular}{lr}" in lines
    assert re.findall(r"\\begin\{(.*?)\}", text) == ["table", "tabular"]
    assert re.findall(r"\\end\{(.*?)\}", text) == ["tabular", "table"]
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert r"\caption{50 \% \& more}" in lines
    assert [line for line in lines if line.endswith(r"\par")] == [r"\#1\par", r"2\par"]


def test_the_latex_of_a_comparison_is_ascii() -> None:
    text = compare_table([record("2*single@1/m8", 1.0, settings={"copies": 2, "ranks": 2})]).latex()
    assert text.isascii()
    assert r"\begin{table*}" in text


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        Table(title="", columns=("a", "b"), rows=(("x",),))


def test_records_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="two records of round 0; keep one run per folder"):
        rows_of([record("dp2", 1.0), record("dp2", 2.0)])
    with pytest.raises(ValueError, match="different settings; keep one run per folder"):
        rows_of([record("dp2", 1.0), record("dp2", 1.0, 1, settings={"threads": 2})])
    with pytest.raises(ValueError, match="0 records of experiment 'compare'; run `mpdqn compare` first"):
        rows_of([])


@pytest.mark.parametrize(
    ("part", "key"), [("settings", "threads"), ("values", "transitions_per_s"), ("values", "peak_memory_bytes")]
)
def test_a_missing_key_is_named(part: str, key: str) -> None:
    whole = record("dp2", 1.0, settings=DP2)
    parts = {"settings": dict(whole.settings), "values": dict(whole.values)}
    del parts[part][key]
    broken = Record(experiment="compare", row="dp2", round=0, seed=0, environment=ENVIRONMENT, **parts)
    with pytest.raises(ValueError, match=f"row 'dp2', round 0, has no '{key}' among its {part}"):
        compare_table([broken])


@pytest.mark.parametrize(("key", "value"), [("bytes_sent", 3), ("step_s", "slow"), ("transitions_per_s", None)])
def test_a_value_of_the_wrong_kind_is_named(key: str, value: object) -> None:
    row = rows_of([record("dp2", 1.0, values={key: value})])[0]
    with pytest.raises(ValueError, match=f"value '{key}' of row 'dp2', round 0, is .* but must"):
        row.per_rank(0, key) if key == "bytes_sent" else row.number(0, key)


def test_a_compiled_split_backward_has_a_note() -> None:
    compiled, plain = {"precision": "float32, compiled"}, {"precision": "float32"}
    rows = [record("a", 1.0, settings=PP2 | {"schedule": "tdzb"} | compiled), record("b", 1.0, settings=PP2 | compiled)]
    assert any(note.startswith("a: a compiled stage's backward cannot be split") for note in compare_table(rows).notes)
    rows = [record("a", 1.0, settings=PP2 | {"schedule": "tdzb"} | plain)]
    assert not any("cannot be split" in note for note in compare_table(rows).notes)
