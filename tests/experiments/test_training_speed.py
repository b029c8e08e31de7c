"""The training speed experiment's bars and its optional peers."""

from __future__ import annotations

from experiments.peers.train_mpdqn import SHIPPED, Games
from experiments.training_speed import (
    COLLECTION,
    DEFAULTS,
    TRAINING,
    TUNED,
    Contender,
    bars,
    collection,
    training,
    training_table,
)
from mpdqn.records import Environment, Record
from mpdqn.train import TrainConfig

ENVIRONMENT = Environment(commit="", versions={}, hardware="", cores=2, memory_gib=1.0, command="")


def turns(workload: str, contender: str, *agent_steps_per_s: float) -> list[Record]:
    return [
        Record(
            experiment="training_speed",
            row=f"{workload}: {contender}",
            round=r,
            seed=0,
            settings={"workload": workload, "contender": contender, "agent_steps_per_call": 400, "threads": 1},
            values={"calls_per_s": rate / 400},
            environment=ENVIRONMENT,
        )
        for r, rate in enumerate(agent_steps_per_s)
    ]


def test_bars_are_against_the_best_published_peer_of_each_round() -> None:
    records = [
        *turns(TRAINING, "mpdqn", 300.0, 600.0, 300.0),
        *turns(TRAINING, "SB3 DQN", 200.0, 100.0, 150.0),
        *turns(TRAINING, "CleanRL dqn_atari", 100.0, 400.0, 100.0),
        *turns(TRAINING, "CleanRL dqn_atari, tuned", 900.0, 900.0, 900.0),
        *turns(COLLECTION, "mpdqn", 2400.0, 2400.0, 2500.0),
        *turns(COLLECTION, "bare loop", 3000.0, 3000.0, 3000.0),
    ]
    both = "(median of the rounds' ratios) and"
    assert bars(records) == (
        f"bar met: mpdqn's training over the best published peer 1.50 {both} 2.00 (ratio of the medians), both at "
        "least 1.50",
        "bar met: mpdqn's collection in agent steps/s 2,400, at least 2,300",
        f"bar missed: mpdqn's collection over the bare loop 0.80 {both} 0.80 (ratio of the medians), both at "
        "least 0.85",
    )


def test_a_bar_is_met_by_both_ratios_or_not_at_all() -> None:
    """The median of the rounds' ratios alone called 1.70 what the medians call 1.53."""
    ours, theirs = (100.0, 160.0, 300.0), (60.0, 200.0, 150.0)  # ratios 1.67, 0.80, 2.00; medians 160 and 150
    (sentence,) = bars([*turns(TRAINING, "mpdqn", *ours), *turns(TRAINING, "SB3 DQN", *theirs)])
    assert sentence.startswith("bar missed: ")
    assert "1.67 (median" in sentence
    assert "1.07 (ratio" in sentence


def test_the_defaults_have_a_row_and_a_bar_of_their_own() -> None:
    config = TrainConfig()
    assert Games(shards=config.num_shards, per_shard=config.envs_per_shard, chunk=config.round_steps) == SHIPPED
    records = [
        *turns(TRAINING, TUNED, 300.0),
        *turns(TRAINING, DEFAULTS, 140.0),
        *turns(TRAINING, "SB3 DQN", 100.0),
    ]
    assert [sentence.split("'s")[0] for sentence in bars(records)] == ["bar met: mpdqn", "bar missed: mpdqn, defaults"]
    notes = " ".join(training_table(records).notes)
    assert "training with 1 × 32 games, collection with 1 × 64 games in chunks of 8 steps" in notes
    assert "mpdqn, defaults: 4 × 2 games" in notes
    assert "did not measure" not in notes
    assert "did not measure" in " ".join(training_table(turns(TRAINING, TUNED, 300.0)).notes)
    assert "rewritten here" in notes


def test_without_peers_there_is_nothing_to_compare_with() -> None:
    assert bars(turns(TRAINING, "mpdqn", 300.0)) == ()


def test_a_peer_that_is_not_installed_is_left_out() -> None:
    contender = Contender(make=lambda: lambda: None, packages=("no_such_package", "torch"))
    assert contender.missing() == ("no_such_package",)
    trainers, collectors = training(80, 64, "/tmp", SHIPPED), collection(64, SHIPPED)
    assert [trainers["mpdqn"].missing(), collectors["mpdqn"].missing(), collectors["bare loop"].missing()] == [()] * 3
