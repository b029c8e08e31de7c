"""What `mpdqn evaluate` shows and keeps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mpdqn import evaluate as evaluating
from mpdqn.bench import evaluation as module
from mpdqn.bench.evaluation import (
    EvaluateConfig,
    evaluate_run,
    evaluation_records,
    evaluation_table,
    run_evaluation,
)
from mpdqn.evaluate import MOST_FRAMES, Evaluation
from mpdqn.networks import make_network
from mpdqn.records import RECORDS, Environment, Record, read_records
from tests.environments.toy import MODULE

PONG = Evaluation(
    environment="pong",
    epsilon=0.001,
    seed=0,
    returns=(14.6, -20.7, 14.6, 14.6),
    lengths=(2000, 1000, 2000, 27000),
    truncated=(False, False, False, True),
    frames=128_000,
    seconds=8.0,
)


def test_the_table() -> None:
    table = evaluation_table(
        [PONG, replace(PONG, environment="reacher", epsilon=0.0, returns=(3.0,), truncated=(False,))]
    )
    assert table.rows[0][:4] == ("pong", "0.001", "4", "5.8")
    assert table.rows[0][5:] == ("14.6", "14.6", "-20.7 to 14.6", "0.750", "1 of 4")
    assert table.rows[1] == ("reacher", "0", "1", "3.0", "–", "3.0", "3.0", "3 to 3", "–", "0 of 1")


def test_records_hold_every_episode() -> None:
    environment = Environment(commit="", versions={}, hardware="", cores=2, memory_gib=1.0, command="")
    (record,) = evaluation_records([PONG], environment, max_steps=30, device="cpu")
    assert Record.from_json(record.to_json()).values["returns"] == list(PONG.returns)
    played = {"env": "pong", "epsilon": 0.001, "episodes": 4}
    assert record.settings == played | {"max_steps": 30, "device": "cpu"}, "all that the returns depend on"


def test_a_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment, its agent's own greedy actions, and records beside those of the training."""

    def greedy(output: Tensor) -> Tensor:
        asked.append(len(output))
        return output.argmin(dim=1)

    asked: list[int] = []
    job = SimpleNamespace(config=SimpleNamespace(env="qbert"), agent=SimpleNamespace(greedy=greedy))
    network = make_network("nature", (4, 84, 84), 6, width=None, seed=0)
    monkeypatch.setattr(module, "load_run", lambda folder, **names: SimpleNamespace(network=network, job=job))
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "evaluation.md").symlink_to(precious)  # the folder may be another user's
    table = evaluate_run(EvaluateConfig(run=tmp_path, episodes=1, epsilon=0.9))
    assert precious.read_text() == "kept"
    assert table.rows[0][:3] == ("qbert", "0.9", "1")
    assert (tmp_path / "evaluation.md").read_text() == table.markdown()
    assert set(asked) == {8}
    (record,) = read_records(tmp_path / RECORDS)
    assert f"{record.values['return_mean']:.1f}" == table.rows[0][3]
    assert (record.settings["max_steps"], record.settings["device"]) == (None, "cpu")


def test_a_run_with_a_video(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    network = make_network("nature", (4, 84, 84), 6, width=None, seed=0)
    config = EvaluateConfig(run=tmp_path, episodes=1, epsilon=1.0, video=tmp_path / "episode.mp4", seed=1)
    (evaluation,) = run_evaluation(config, network, "qbert")
    assert len(evaluation.returns) == 1
    assert (tmp_path / "episode.mp4").stat().st_size > 1000


def test_without_the_extra_nothing_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    config = EvaluateConfig(run=tmp_path, video=tmp_path / "episode.mp4")
    with pytest.raises(ValueError, match=r"mpdqn\[video\]"):
        run_evaluation(config, make_network("nature", (4, 84, 84), 6, width=None, seed=0), "no such game")


class Still(nn.Module):
    """Always takes the first action."""

    def forward(self, frames: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(frames), -1)


def test_a_policy_that_stands_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a limit of its own never ended the episode, nor the evaluation."""
    endless = f"{MODULE}:mpdqn-tests/Endless-Drift-v0"
    config = EvaluateConfig(run=tmp_path, episodes=2, epsilon=0.0, num_envs=2)
    (cut,) = run_evaluation(replace(config, max_steps=30), Still(), endless)
    assert (cut.lengths, cut.truncated) == ((30, 30), (True, True))
    assert (MOST_FRAMES, config.max_steps) == (108_000, None)
    monkeypatch.setattr(evaluating, "MOST_FRAMES", 40)  # 108,000 steps of an environment in Python take a minute
    (cut,) = run_evaluation(config, Still(), endless)
    assert (cut.lengths, cut.truncated) == ((40, 40), (True, True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--device cuda, but torch .* sees 0 CUDA devices"):
        evaluate_run(EvaluateConfig(run=tmp_path, device="cuda"))


def test_both_epsilons_by_default(tmp_path: Path) -> None:
    assert EvaluateConfig(run=tmp_path).epsilons == (0.001, 0.0)
    assert EvaluateConfig(run=tmp_path, epsilon=0.05).epsilons == (0.05,)
