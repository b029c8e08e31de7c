"""The table of a speed comparison: medians of the rounds, ratios within them."""

from mpdqn.bench.speed import speed_table
from mpdqn.records import Environment, Record

ENVIRONMENT = Environment(
    commit="", versions={"torch": "2.14"}, hardware="a CPU", cores=2, memory_gib=8.0, command="python -m x"
)


def record(workload: str, contender: str, round_: int, rate: float) -> Record:
    return Record(
        experiment="speed",
        row=f"{workload}: {contender}",
        round=round_,
        seed=0,
        settings={"workload": workload, "contender": contender},
        values={"calls_per_s": rate},
        environment=ENVIRONMENT,
    )


def test_ratios_are_taken_within_a_round() -> None:
    rates = {"ours": (20.0, 30.0, 80.0), "peer": (10.0, 10.0, 20.0), "tuned": (16.0, 15.0, 32.0)}
    records = [record("w", name, r, rate) for name, own in rates.items() for r, rate in enumerate(own)]
    records += [record("v", "ours", 0, 5.0)]
    table = speed_table(records, "Speed", peers=("peer", "tuned"))
    assert table.columns == ("workload", "contender", "per second", "× peer", "× tuned")
    assert table.rows == (
        ("w", "ours", "30.0 [20.0–80.0]", "3.00 [2.00–4.00]×", "2.00 [1.25–2.50]×"),
        ("w", "peer", "10.0 [10.0–20.0]", "–", "0.62 [0.62–0.67]×"),
        ("w", "tuned", "16.0 [15.0–32.0]", "1.60 [1.50–1.60]×", "–"),
        ("v", "ours", "5.0 [5.0–5.0]", "–", "–"),  # without a peer there is nothing to compare with
    )
    assert table.notes[0] == "median [min–max] of 1–3 interleaved rounds; ratios are taken within a round"
    assert table.notes[1].startswith("a CPU, 2 cores; torch 2.14; commit ")
    assert len(table.notes) == 2, "one environment"


def test_a_round_that_the_peer_lacks_does_not_count() -> None:
    records = [record("w", "ours", 0, 20.0), record("w", "peer", 0, 10.0), record("w", "ours", 1, 90.0)]
    ours, _ = speed_table(records, "Speed", peers=("peer",)).rows
    assert ours[-1].startswith("2.00")
