"""Learning curves of runs that were logged at different frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpdqn.bench.curves import Curve, CurvesConfig, Run, curves, curves_figure, group, labels, read_curve
from mpdqn.logs import open_logs
from mpdqn.records import RECORDS, Environment, Record, append_records

ENVIRONMENT = Environment(commit="", versions={}, hardware="", cores=2, memory_gib=1.0, command="")


def make_run(folder: Path, row: str, scores: list[float], *, every: int = 1000, **settings: str) -> Path:
    with open_logs(folder, config={}) as logs:
        for i, score in enumerate(scores, start=1):
            logs.write(i * every, {"loss": 1.0, "mean_return": score})
    record = Record(
        experiment="train",
        row=row,
        round=0,
        seed=0,
        settings=settings,
        values={"agent_steps_per_s": 1.0},
        environment=ENVIRONMENT,
    )
    # A run's evaluations are records, too, and no names of it.
    append_records(folder / RECORDS, [replace(record, experiment="evaluate", row="pong, ε = 0"), record])
    return folder


def test_runs_of_one_label_become_a_line_with_a_band() -> None:
    """Logged at different frames, they are read off where all of them have values."""
    runs = [
        Run(label="dqn", frames=np.array([0.0, 100.0]), scores=np.array([0.0, 10.0])),
        Run(label="rainbow", frames=np.array([0.0, 400.0]), scores=np.array([1.0, 1.0])),
        Run(label="dqn", frames=np.array([50.0, 200.0]), scores=np.array([15.0, 15.0])),
    ]
    dqn, rainbow = group(runs)
    assert (dqn.label, dqn.runs, rainbow.label, rainbow.runs) == ("dqn", 2, "rainbow", 1)
    assert (dqn.frames[0], dqn.frames[-1]) == (50.0, 100.0)
    assert (dqn.low[0], dqn.average[0], dqn.high[0]) == (5.0, 10.0, 15.0)
    assert (dqn.low[-1], dqn.average[-1], dqn.high[-1]) == (10.0, 12.5, 15.0)
    assert rainbow.frames[-1] == 400.0
    np.testing.assert_array_equal(rainbow.low, rainbow.high)


def test_averages_and_bands() -> None:
    runs = [
        Run(label="dqn", frames=np.array([0.0, 1.0]), scores=np.full(2, score)) for score in (0.0, 1.0, 2.0, 3.0, 100.0)
    ]
    (line,) = group(runs, average="iqm", band="interval")
    assert line.average[0] == 2.0
    assert 0.0 <= line.low[0] < 2.0 < line.high[0] < 100.0


def test_a_run_is_smoothed_by_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "dqn", [1.0, float("nan"), 3.0, 5.0])
    np.testing.assert_array_equal(read_curve(folder).scores, [1.0, 3.0, 5.0])
    run = read_curve(folder, window=2)
    np.testing.assert_array_equal(run.scores, [1.0, 2.0, 4.0])
    np.testing.assert_array_equal(run.frames, [1000, 3000, 4000])
    assert run.label == "dqn"


def test_labels_say_in_what_runs_differ(tmp_path: Path) -> None:
    """Two layouts of one agent are no seeds of each other."""
    folders = [
        make_run(tmp_path / name, "pong dqn", [1.0], environment="pong", layout=layout)
        for name, layout in (("a", "single@all"), ("b", "pp2-1f1b"), ("c", "single@all"))
    ]
    assert labels(folders) == [
        "pong dqn, layout single@all",
        "pong dqn, layout pp2-1f1b",
        "pong dqn, layout single@all",
    ]
    assert labels([folders[0], folders[2]]) == ["pong dqn", "pong dqn"]
    named = make_run(tmp_path / "d", "pong dqn", [1.0], label="ours")
    assert labels([folders[0], named])[1] == "ours"


def test_a_run_without_records_is_called_by_its_folder(tmp_path: Path) -> None:
    with open_logs(tmp_path / "my-run", config={}) as logs:
        logs.write(4, {"mean_return": 1.0})
    assert read_curve(tmp_path / "my-run").label == "my-run"


def test_the_figure_of_several_runs(tmp_path: Path) -> None:
    folders = (
        make_run(tmp_path / "a", "dqn", [-21.0, -15.0, 3.0]),
        make_run(tmp_path / "b", "dqn", [-20.0, -10.0, 7.0, 9.0], every=900),
        make_run(tmp_path / "c", "rainbow, pp2", [-21.0, 5.0, 20.0]),
    )
    svg, png = curves(CurvesConfig(runs=folders, out=tmp_path / "figures" / "pong"))
    assert png.stat().st_size > 10_000
    first = svg.read_bytes()
    curves(CurvesConfig(runs=folders, out=tmp_path / "figures" / "pong"))
    assert svg.read_bytes() == first, "the same runs give the same file"


def test_lines_differ_in_grey_print() -> None:
    x = np.array([0.0, 1.0])
    lines = [Curve(label=str(i), runs=1, frames=x, average=x + i, low=x, high=x) for i in range(7)]
    drawn = curves_figure(lines, CurvesConfig(runs=(), column="evaluation_return")).axes[0]
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in drawn.lines}) == 7
    assert drawn.get_xlabel() == "environment frames"
    assert drawn.get_ylabel() == "evaluation return"


@pytest.mark.parametrize("letters", [4, 26, 27, 45])
def test_the_legend_fits_into_the_figure(letters: int) -> None:
    x = np.arange(3.0)
    lines = [Curve(label="e" * letters, runs=1, frames=x, average=x, low=x, high=x) for _ in range(2)]
    figure = curves_figure(lines, CurvesConfig(runs=()))
    figure.draw_without_rendering()
    box, (legend,) = figure.bbox, figure.legends
    found = legend.get_window_extent()
    assert box.x0 <= found.x0 < found.x1 <= box.x1


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs to draw"):
        curves(CurvesConfig(runs=()))
    folder = make_run(tmp_path / "a", "dqn", [1.0])
    with pytest.raises(ValueError, match=r"nothing in column 'reward' yet; its columns: loss, mean_return"):
        read_curve(folder, "reward")
    with pytest.raises(ValueError, match="window is 0"):
        read_curve(folder, window=0)
    apart = [Run(label="dqn", frames=np.array([f, f + 1]), scores=np.zeros(2)) for f in (0.0, 10.0)]
    with pytest.raises(ValueError, match="the runs of 'dqn' share no frames"):
        group(apart)
