"""One rank's loop: its counts, its randomness, and what happens to a loss that is no number."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

from mpdqn.train import NotANumber, Trainer, TrainStep
from tests.environments.toy import limited
from tests.train.settings import small


def run(tmp_path: Path, **settings: Any) -> tuple[list[TrainStep], dict[str, torch.Tensor]]:
    with Trainer.alone(small(tmp_path, **settings)) as trainer:
        steps = list(trainer.run())
        return steps, {name: t.clone() for name, t in trainer.weights().items()}


def test_counts_are_those_of_the_settings(tmp_path: Path) -> None:
    steps, _ = run(tmp_path)
    assert [step.round for step in steps] == list(range(200))
    assert [step.transitions for step in steps] == [8 * (r + 1) for r in range(200)]
    assert steps[-1].frames == 1_600
    assert steps[-1].updates == (1_600 - 500) // 4 == sum(len(step.losses) for step in steps)
    first = next(step for step in steps if step.losses)
    assert first.transitions == 504
    assert steps[0].epsilon > steps[-1].epsilon == pytest.approx(0.01)
    played = sum(e.length for step in steps for e in step.episodes)
    assert 1_600 - 8 * 200 / 2 < played <= 1_600
    assert {e.environment for step in steps for e in step.episodes} == set(range(8))
    assert all(step.actor_lag == 0 and step.restarts == 0 for step in steps)


@pytest.mark.parametrize("settings", [{}, {"agent": "rainbow"}, {"actor_lag": 1, "prefetch": 1, "lookahead": 1}])
def test_a_seed_makes_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every bit of weights, losses and episodes; another seed makes another run."""
    settings = {"frames": 1_000} | settings
    (one, weights), (again, same) = run(tmp_path, **settings), run(tmp_path, **settings)
    for a, b in zip(one, again, strict=True):
        assert a.episodes == b.episodes
        assert [loss.item() for loss in a.losses] == [loss.item() for loss in b.losses]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    _, other = run(tmp_path, **settings, seed=1)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize("lag", [1, 3])
def test_a_lag_is_counted_in_updates_and_acts_with_older_weights(lag: int, tmp_path: Path) -> None:
    steps, weights = run(tmp_path, actor_lag=lag, round_steps=2)
    assert steps[-1].actor_lag == 4 * lag  # 16 transitions a round make 4 updates
    assert steps[0].actor_lag == 0
    plain, others = run(tmp_path, round_steps=2)
    learning = next(step.round for step in plain if step.losses)
    same = [a.episodes == b.episodes for a, b in zip(plain, steps, strict=True)]
    assert all(same[: learning + 1])  # nothing was learned yet: old weights are the new ones
    assert not all(same)
    assert not all(torch.equal(weights[name], others[name]) for name in weights)


def test_each_setting_makes_a_difference(tmp_path: Path) -> None:
    """A switch that does nothing would pass every test of equality."""
    short = {"frames": 720}
    _, plain = run(tmp_path, **short)
    for settings in (
        {"double": True},
        {"n_step": 3},
        {"prioritized": True},
        {"noisy": True},
        {"prefetch": 1},
        {"lookahead": 1},
        {"target_tau": 0.5},
        {"precision": "bf16"},
        {"seed": 3},
    ):
        _, other = run(tmp_path, **short, **settings)
        assert any(name not in plain or not torch.equal(other[name], plain[name]) for name in other), settings


@pytest.mark.parametrize("prioritized", [False, True])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_batch(prioritized: bool, tmp_path: Path) -> None:
    config = small(tmp_path, learning_rate=1e38, prioritized=prioritized)
    folder = tmp_path / "run"
    folder.mkdir()
    with Trainer.alone(config, folder) as trainer, pytest.raises(NotANumber, match="learning_rate") as caught:
        list(trainer.run())
    (path,) = folder.glob("failed-update-*-rank0.pt")
    assert str(path).replace("rank0", "rank*") in str(caught.value)
    kept = torch.load(path, weights_only=True)
    assert kept["batches"][0]["obs"].shape == (32, 4, 10, 10)
    assert not all(bool(t.isfinite().all()) for t in kept["weights"].values())


def test_a_process_is_left_as_it_was_also_by_a_run_that_failed(tmp_path: Path) -> None:
    """A notebook goes on: with all its cores and threads, and able to train again."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def fail() -> None:
        with Trainer.alone(small(tmp_path)) as trainer:
            next(trainer.run())
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


def test_a_run_on_disk_is_the_run_in_memory(tmp_path: Path) -> None:
    steps, weights = run(tmp_path)
    mapped, same = run(tmp_path, replay_dir=tmp_path / "replay")
    assert [s.episodes for s in steps] == [s.episodes for s in mapped]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert any((tmp_path / "replay").rglob("*"))


def test_a_simulator_that_dies_is_replaced_and_changes_nothing(tmp_path: Path) -> None:
    """In the middle of learning, in a worker: counted, and every episode and weight as without."""
    deadly = tmp_path / "deadly"
    name = "mpdqn-tests/Deadly-training-v0"
    gymnasium.registry.pop(name, None)
    gymnasium.register(name, entry_point=limited, kwargs={"deadly": str(deadly)})
    settings: dict[str, Any] = {"env": name, "frames": 800, "network": "tests/train/network.py:make_network"}

    def weights(disturbed: bool) -> tuple[list[TrainStep], dict[str, torch.Tensor]]:
        with Trainer.alone(small(tmp_path, **settings, env_workers=2)) as trainer:
            steps = []
            for step in trainer.run():
                steps.append(step)
                if disturbed and step.round == 80:
                    deadly.touch()
            return steps, {n: t.clone() for n, t in trainer.weights().items()}

    (calm, expected), (killed, found) = weights(False), weights(True)
    assert (calm[-1].restarts, killed[-1].restarts) == (0, 1)
    assert not deadly.exists()
    assert [s.episodes for s in calm] == [s.episodes for s in killed]
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_layout_of_several_ranks_is_not_run_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="layout dp2 needs 2 ranks"),
        Trainer.alone(dataclasses.replace(small(tmp_path), layout="dp2")),
    ):
        pass
