"""`train` and `compare` learn from what the emulator showed, on an environment of every field."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mpdqn import actors
from mpdqn.bench.comparison import compare_table
from mpdqn.environments import environment_spec, make_environment, robot
from mpdqn.learner import Learner
from mpdqn.train import TrainConfig, Trainer
from mpdqn.train.check import check as check_train
from tests.bench.in_process import compared


def _require(env: str) -> None:
    """Skip the test, with the reason, where the extra of ``env`` or a renderer is missing."""
    try:
        environment_spec(env)
        if env in robot.tasks():
            robot.find_renderer()
    except ValueError as error:
        pytest.skip(str(error))


@dataclass
class Seen:
    """What the emulators showed, and what learners were given."""

    shown: set[bytes] = field(default_factory=set)
    learned: list[Tensor] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Records every observation that an environment returns and every batch that a learner learns from."""
    found = Seen()

    def watched(name: str, **settings: Any) -> Any:
        environment = make_environment(name, **settings)
        observed = environment._observed

        def show() -> dict[str, Tensor]:
            result = observed()
            found.shown |= {o.numpy().tobytes() for o in result["observation"]}
            return result

        environment._observed = show  # type: ignore[method-assign]
        return environment

    learn = Learner.learn

    def recorded(self: Learner, batch: Any, upcoming: Any = None) -> Any:
        assert batch is not None
        found.learned += [batch.obs.clone(), batch.next_obs.clone()]
        found.actions.append(batch.action.clone())
        return learn(self, batch, upcoming)

    monkeypatch.setattr(actors, "make_environment", watched)
    monkeypatch.setattr(Learner, "learn", recorded)
    return found


STEPS = 16
"""Of each of the two environments that `train` plays."""

ENVIRONMENTS = [("minatar-breakout", "double_dqn", 1), ("highway-fast", "c51", 1), ("reacher", "decqn", 2)]


def _never_shown(seen: Seen) -> tuple[int, int]:
    """How many of the observations that were learned from no emulator showed, and of how many."""
    rows = [row for batch in seen.learned for row in batch]
    return sum(row.contiguous().numpy().tobytes() not in seen.shown for row in rows), len(rows)


@pytest.mark.parametrize(("env", "agent", "frames"), ENVIRONMENTS)
def test_compare_learns_from_observations_that_were_shown(
    tmp_path: Path, seen: Seen, env: str, agent: str, frames: int
) -> None:
    _require(env)
    network = "minatar" if env.startswith("minatar") else "nature"
    records = compared(tmp_path, env=env, agent=agent, network=network, epsilon=0.5)
    spec = environment_spec(env)
    assert _never_shown(seen)[0] == 0, "of {1} observations, {0} were never shown".format(*_never_shown(seen))
    assert _never_shown(seen)[1] == 2 * 8 * 6, "obs and next_obs of two updates each of reference, check and turn"
    assert {tuple(a.shape) for a in seen.actions} == {(8, *spec.action_shape)}
    assert 0 <= min(int(a.min()) for a in seen.actions) < max(int(a.max()) for a in seen.actions) < spec.num_actions
    assert {record.settings["frames_per_transition"] for record in records} == {frames}
    assert all(record.values["gradient_error"] < 5e-5 for record in records)  # type: ignore[operator]
    assert f"{frames} per transition" in compare_table(records).notes[2]


@pytest.mark.parametrize(("env", "agent", "frames"), ENVIRONMENTS)
def test_train_learns_from_observations_that_were_shown(
    tmp_path: Path, seen: Seen, env: str, agent: str, frames: int
) -> None:
    _require(env)
    config = TrainConfig(
        env=env,
        agent=agent,
        layout="pp2-td1f1b+stacked/m2",
        lookahead=1,
        frames=STEPS * 2 * frames,
        batch_size=8,
        num_shards=2,
        envs_per_shard=1,
        min_replay=16,
        capacity=128,
        replay_period=4,
        out=tmp_path,
    )
    spec = environment_spec(env)
    with Trainer.alone(config) as trainer:
        for step in trainer.run():
            last = step
        rows = sum(len(batch) for batch in seen.learned)
        updates = trainer.job.updates_after(trainer.job.num_rounds)
    assert updates >= 4
    assert rows == 2 * 8 * updates
    assert _never_shown(seen)[0] == 0, "of {1} observations, {0} were never shown".format(*_never_shown(seen))
    assert {tuple(a.shape) for a in seen.actions} == {(8, *spec.action_shape)}
    assert last.frames == STEPS * 2 * frames, "frames are counted in the environment's own unit"
    assert check_train(config).spec.frames_per_action == frames
