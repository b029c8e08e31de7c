"""`mpdqn.compare` called from Python, with one worker; tests/cli has the whole runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpdqn
from mpdqn.bench.compare import render
from tests.bench.in_process import compared


@pytest.mark.pool
def test_a_comparison_from_python(tmp_path: Path) -> None:
    """With a function that closes over the test's own names, another agent, and settings beside a configuration."""
    width = 8

    class Frames(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() / 255

    def my_network(shape: tuple[int, int, int], actions: int) -> nn.Module:
        return nn.Sequential(
            Frames(), nn.Conv2d(shape[0], width, 8, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(actions)
        )

    environment, random = dict(os.environ), torch.get_rng_state()
    config = mpdqn.CompareConfig(smoke=True, transitions=64, out=tmp_path, agent="dqn", rounds=3)
    comparison = mpdqn.compare(
        config, network=my_network, layouts=["single@1", "pp2-gpipe+stacked/m4", "single@1/m4"], rounds=1, seed=5
    )
    assert isinstance(comparison, mpdqn.Comparison)
    assert [record.row for record in comparison.records] == ["single@1", "pp2-gpipe+stacked/m4", "single@1/m4"]
    assert comparison.folder.parent == tmp_path
    assert comparison.table.markdown() in (comparison.folder / "table.md").read_text()
    assert comparison.verdict in (comparison.folder / "table.md").read_text()
    for record in comparison.records:
        assert (record.round, record.seed) == (0, 5)
        assert (record.settings["agent"], record.settings["network"]) == ("dqn", "my_network")
        assert record.values["gradient_error"] < 5e-5  # type: ignore[operator]
        assert record.values["td_error_error"] < 5e-5  # type: ignore[operator]
        assert record.values["bubble_measured"] == 0.0
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), random)

    again = render(comparison.folder)
    assert again == comparison


def test_an_agent_with_a_head_of_its_own_is_compared(tmp_path: Path) -> None:
    """Transitions are played and learned from with the head that Rainbow needs; noise and passes run ahead.

    tests/workload has DecQN, whose head branches.
    """
    (record,) = compared(tmp_path, "nature", agent="rainbow", batch_size=16, layouts=["pp2-td1f1b+stacked/m4"])
    assert (record.settings["agent"], record.settings["head"]) == ("rainbow", "dueling")
    assert 0 < record.values["gradient_error"] < 5e-5  # type: ignore[operator]
    assert record.values["td_error_error"] < 5e-5  # type: ignore[operator]


def test_a_setting_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="batchsize"):
        mpdqn.compare(batchsize=3)


def test_a_name_that_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'mpdqn' has no attribute 'fly'"):
        _ = mpdqn.fly
