"""The training speed experiment's bars and its optional peers."""

from __future__ import annotations

from experiments.training_speed import COLLECTION, TRAINING, Contender, bars, collection, training
from mpdqn.records import Environment, Record

ENVIRONMENT = Environment(commit="", versions={}, hardware="", cores=2, memory_gib=1.0, command="")


def turns(workload: str, contender: str, *agent_steps_per_s: float) -> list[Record]:
    return [
        Record(
            experiment="training_speed",
            row=f"{workload}: {contender}",
            round=r,
            seed=0,
            settings={"workload": workload, "contender": contender, "agent_steps_per_call": 400},
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
    assert bars(records) == (
        "bar met: mpdqn's training over the best published peer 1.50, at least 1.50",
        "bar met: mpdqn's collection in agent steps/s 2,400, at least 2,300",
        "bar missed: mpdqn's collection over the bare loop 0.80, at least 0.85",
    )


def test_without_peers_there_is_nothing_to_compare_with() -> None:
    assert bars(turns(TRAINING, "mpdqn", 300.0)) == ()


def test_a_peer_that_is_not_installed_is_left_out() -> None:
    contender = Contender(make=lambda: lambda: None, packages=("no_such_package", "torch"))
    assert contender.missing() == ("no_such_package",)
    trainers, collectors = training(80, 64, "/tmp"), collection(64)
    assert [trainers["mpdqn"].missing(), collectors["mpdqn"].missing(), collectors["bare loop"].missing()] == [()] * 3
