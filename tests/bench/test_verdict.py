"""The verdict names the fastest layout, a tie where the rounds cannot tell, and only losses that were measured."""

import pytest

from mpdqn.bench.verdict import Standing, breakdown, standing, verdict
from mpdqn.records import Record
from tests.bench.test_tables import DP2, PP2, record

M8 = {"num_microbatches": 8}
TWO = {"threads": 2}


def comparison(dp2: float = 1.25, pp2: float = 1.0, single2: float = 1.1, rounds: int = 3) -> list[Record]:
    """single@1 takes 1.6 s, with m = 8 1.8 s; the other rows what is asked. Each round is slower than the last."""
    records = []
    for r in range(rounds):
        s = 1.1**r
        bubble = {"bubble_measured": 0.2, "bubble_simulated": 0.1}
        records += [
            record("single@1", 1.6 * s, r),
            record("single@1/m8", 1.8 * s, r, settings=M8),
            record("single@2", single2 * s, r, settings=TWO),
            record("dp2", dp2 * s, r, settings=DP2, values={"compute_s": [0.9 * s] * 2, "exchange_s": [0.3 * s] * 2}),
            record("pp2/m8", pp2 * s, r, settings=PP2, values=bubble | {"compute_s": [0.9 * s, 0.9 * s]}),
        ]
    return records


def test_a_pipeline_wins() -> None:
    # dp2: the exchange is 0.3 of 1.25 s. Ratios are within the round, so the drift does not blur them.
    assert verdict(comparison()) == (
        "pp2/m8 is fastest here, 1.10× [1.10–1.10] the best single process (single@2); "
        "of its step time, dp2 loses 24 % to messages."
    )


def test_a_single_process_wins() -> None:
    # pp2: waits 0.2/0.8 · 0.9 = 0.225 s, of which simulation explains 0.1/0.9 · 0.9 = 0.1 s; 0.125 of 1.25 s remain.
    assert verdict(comparison(pp2=1.25)) == (
        "The single process (single@2) is fastest here: dp2 reaches 0.88× [0.88–0.88] of it; "
        "of its step time, dp2 loses 24 % to messages and pp2/m8 10 % to messages."
    )


def test_a_difference_within_the_spread_is_a_tie_with_the_single_process() -> None:
    slower_in_round_1 = [
        record(r.row, 1.3, r.round, settings=r.settings) if (r.row, r.round) == ("pp2/m8", 1) else r
        for r in comparison(pp2=1.08)
    ]
    assert verdict(slower_in_round_1).startswith(
        "pp2/m8 leads here in the median but is not distinguishable from single@2; "
        "it reaches 1.02× [0.93–1.02] of single@2, the best single process; of its step time, dp2 loses"
    )


def test_a_tie_between_layouts_still_beats_the_single_process() -> None:
    assert verdict(comparison(dp2=1.0)).startswith(
        "dp2 leads here in the median but is not distinguishable from pp2/m8, "
        "1.10× [1.10–1.10] the best single process (single@2); "
    )


def test_a_single_process_that_only_ties_says_so() -> None:
    assert verdict(comparison(pp2=1.1)).startswith(
        "The single process (single@2) leads here in the median but is not distinguishable from pp2/m8: "
        "pp2/m8 reaches 1.00× [1.00–1.00] of it"
    )


def test_the_standing_needs_two_rounds_and_a_lead_in_each() -> None:
    fast, slow = {0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.9}
    assert standing({"a": slow, "b": fast}, {}) == Standing(leader="b", tied=())
    assert standing({"a": slow, "b": {0: 2.0}}, slow) == Standing(leader="b", tied=("a",))
    assert standing({"a": {0: 1.0, 1: 2.1}, "b": fast}, {}) == Standing(leader="b", tied=("a",))


def test_the_leader_leads_within_the_rounds_whatever_the_drift() -> None:
    # The medians of the speeds say a (3 > 2.2); within the rounds b is 1.1, 1.1 and 0.5 times a.
    a, b = {0: 2.0, 1: 3.0, 2: 4.0}, {0: 2.2, 1: 3.3, 2: 2.0}
    assert standing({"a": a, "b": b}, a) == Standing(leader="b", tied=("a",))


def test_the_single_processes_compete_as_the_best_of_each_round() -> None:
    # dp2 beats either single process in one round, and the better of the two in none.
    one, two, dp2 = (1.0, 2.0), (2.0, 1.0), (1.9, 1.9)
    rows = (("single@1", one, None), ("single@2", two, TWO), ("dp2", dp2, DP2))
    records = [record(name, 64 / s[r], r, settings=settings) for r in range(2) for name, s, settings in rows]
    assert verdict(records).startswith("The single process (single@1) is fastest here: dp2 reaches 0.95× [0.95–0.95]")


def test_the_breakdown_of_a_step_by_hand() -> None:
    losses = breakdown(comparison(pp2=1.4, rounds=1))
    pipeline = losses["pp2/m8"]
    assert pipeline is not None
    assert (pipeline.step_s, pipeline.ideal_s) == (1.4, 0.8)
    assert pipeline.parts == pytest.approx(
        {
            "micro-batching": (1.8 - 1.6) / 2,
            "contention": 0.0,  # 0.9 s on each rank is half of the single process's 1.8 s
            "imbalance": 0.0,
            "bubble": 0.1,
            "messages": 0.125,
            "optimizer": 0.0,
            "other": 1.4 - 0.8 - 0.1 - 0.1 - 0.125,
        }
    )
    assert pipeline.largest == "other"
    assert pipeline.share("bubble") == pytest.approx(0.1 / 1.4)
    data = losses["dp2"]
    assert data is not None
    assert data.parts == pytest.approx(
        dict.fromkeys(("micro-batching", "imbalance", "bubble", "optimizer"), 0.0)
        | {"contention": 0.1, "messages": 0.3, "other": 0.05}
    )


def test_imbalance_is_waiting_that_is_no_bubble() -> None:
    # The mean rank computes 0.9 s and waits 0.2 s in 1.1 s; 0.15 s of that is for the slower stage.
    values = {"bubble_measured": 0.2 / 1.1, "bubble_simulated": 0.1, "compute_s": [1.05, 0.75]}
    loss = breakdown([*comparison(rounds=1)[:2], record("pp2/m8", 1.1, settings=PP2, values=values)])["pp2/m8"]
    assert loss is not None
    assert loss.parts["imbalance"] == pytest.approx(0.15)
    assert loss.parts["bubble"] == pytest.approx(0.05)
    assert loss.parts["messages"] == pytest.approx(0.0)


def test_replicas_repeat_the_optimizer() -> None:
    records = [
        record("single@1", 1.6, values={"compute_s": [1.4], "optimizer_s": [0.2]}),
        record("dp2", 0.9, settings=DP2, values={"compute_s": [0.7] * 2, "optimizer_s": [0.2] * 2}),
    ]
    loss = breakdown(records)["dp2"]
    assert loss is not None
    assert loss.parts["optimizer"] == pytest.approx(0.1)
    assert loss.largest == "optimizer"


def test_small_micro_batches_of_replicas_are_told_from_contention_where_they_were_measured() -> None:
    m2 = record("single@1/m2", 1.8, settings={"num_microbatches": 2})
    dp2 = record("dp2", 0.9, settings=DP2)
    losses = [breakdown([record("single@1", 1.6), *more, dp2])["dp2"] for more in ([], [m2])]
    parts = [loss.parts for loss in losses if loss is not None]
    assert [p["micro-batching"] for p in parts] == pytest.approx([0.0, 0.1])
    assert [p["contention"] for p in parts] == pytest.approx([0.1, 0.0])


def test_without_the_same_micro_batches_alone_their_cost_is_not_invented() -> None:
    loss = breakdown([record("single@1", 1.6), record("pp2/m8", 1.4, settings=PP2)])["pp2/m8"]
    assert loss is not None
    assert "micro-batching" not in loss.parts
    assert "contention" not in loss.parts
    assert loss.parts["other"] == pytest.approx(0.6)
    records = [record("single@1", 1.0), record("pp2/m8", 1.4, settings=PP2)]
    assert "pp2/m8 loses 64 % to causes not measured" in verdict(records)


def test_the_whole_machine_in_one_process_serves_where_a_ranks_share_was_not_measured() -> None:
    wide = DP2 | {"threads": 4}
    loss = breakdown([record("single@8", 0.5, settings={"threads": 8}), record("dp2", 0.6, settings=wide)])["dp2"]
    assert loss is not None
    assert loss.ideal_s == 0.5


def test_what_cannot_be_attributed_is_not() -> None:
    crowded = DP2 | {"oversubscribed": True}
    records = [
        *(record("single@3", 1.0, r, settings={"threads": 3}) for r in range(2)),
        *(record("dp2", 2.0, r, settings=DP2) for r in range(2)),
        *(record("dp4", 3.0, r, settings=crowded) for r in range(2)),
    ]
    assert breakdown(records) == {"dp2": None, "dp4": None}
    assert verdict(records) == (
        "The single process (single@3) is fastest here: dp2 reaches 0.50× [0.50–0.50] of it; "
        "dp4 is oversubscribed; the loss of dp2 is not attributed."
    )


def test_without_a_single_process_nothing_is_attributed() -> None:
    records = [r for r in comparison() if not r.row.startswith("single")]
    assert verdict(records) == (
        "pp2/m8 is fastest here; no single process was measured, so by how much is unknown and no loss is attributed."
    )


def test_single_processes_alone_and_copies_alone() -> None:
    singles = [r for r in comparison() if r.row.startswith("single")]
    copies = [record("2*single@1", 0.1, r, settings={"copies": 2, "ranks": 2}) for r in range(3)]
    assert verdict(singles + copies).startswith("single@2 is the fastest single process here; no layout of several")
    assert verdict(copies).startswith("No layout was measured")
