"""What `mpdqn evaluate` runs: the episodes of a trained network, greedy and ε-greedy, as a table and a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mpdqn.bench.tables import NOTHING, Table
from mpdqn.evaluate import EVALUATION_EPSILON, Evaluation, Greedy, argmax, evaluate
from mpdqn.files import check_plain, write_whole
from mpdqn.mesh import check_device
from mpdqn.records import RECORDS, Environment, Record, append_records
from mpdqn.train import load_run
from mpdqn.video import open_video


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate."""

    run: Path
    """Folder of a training run."""
    network: str = ""
    """The run's network again, if it is a function in a file: nothing that only a folder names is run."""
    env: str = ""
    """The run's environment again, if it lies in a module."""
    trust: bool = False
    """Run the code that the folder names without naming it again."""
    episodes: int = 10
    """Episodes to play, for each ε."""
    epsilon: float | None = None
    """Probability of a uniform action; both 0.001 and 0 (greedy) if not given."""
    video: Path | None = None
    """An .mp4 of the last ε's first episode, as the agent sees it; needs the extra video."""
    seed: int = 0
    """Seed of the episodes; they are others than those of training."""
    num_envs: int = 8
    """Episodes played at a time; the result does not depend on it."""
    workers: int = 0
    """Processes that step slow simulators; 0 steps them in this one. The result does not depend on it."""
    max_steps: int | None = None
    """Agent steps after which an episode is cut short; default: 108,000 frames, as in training."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network is."""

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Every ε to play with."""
        return (EVALUATION_EPSILON, 0.0) if self.epsilon is None else (self.epsilon,)


def evaluate_run(config: EvaluateConfig) -> Table:
    """Evaluate the network of a training run; its folder gets ``evaluation.md`` and the records.

    Raises:
        mpdqn.train.resume.UntrustedCode: for code that only the folder names, before any of it runs.
        ValueError: for a folder without a finished run, or whose records are a link; or a setting out of range.
    """
    check_device(config.device)
    check_plain(config.run / RECORDS)
    run = load_run(config.run, network=config.network, env=config.env, trust=config.trust)
    network, env = run.network.to(config.device), run.job.config.env
    played = run_evaluation(config, network, env, greedy=run.job.agent.greedy, device=config.device)
    devices = torch.cuda.get_device_name() if config.device == "cuda" else ""
    table = evaluation_table(played)
    write_whole(config.run / "evaluation.md", table.markdown())
    records = evaluation_records(played, Environment.current(devices), max_steps=config.max_steps, device=config.device)
    append_records(config.run / RECORDS, records)
    return table


def run_evaluation(
    config: EvaluateConfig,
    network: nn.Module,
    environment: str,
    *,
    greedy: Greedy = argmax,
    device: torch.device | str = "cpu",
) -> tuple[Evaluation, ...]:
    """Play ``config.episodes`` with each ε; see `mpdqn.evaluate.evaluate` for the arguments.

    Raises:
        ValueError: if a setting is out of range, or a video is asked for without the extra ``video``.
    """
    *others, last = config.epsilons

    def play(epsilon: float, **watch: object) -> Evaluation:
        return evaluate(
            network,
            environment,
            episodes=config.episodes,
            epsilon=epsilon,
            seed=config.seed,
            greedy=greedy,
            num_envs=config.num_envs,
            workers=config.workers,
            device=device,
            max_steps=config.max_steps,
            **watch,  # type: ignore[arg-type]
        )

    if config.video is None:
        return tuple(play(epsilon) for epsilon in config.epsilons)
    with open_video(config.video) as video:  # before anything is played: the extra may be missing
        return (*(play(epsilon) for epsilon in others), play(last, watch=video.add))


def evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """One row for each evaluation: mean with its interval, median, IQM and human-normalised score."""
    rows = []
    for e in evaluations:
        interval = e.interval()
        spread = NOTHING if len(e.returns) < 2 else f"{interval.low:.1f} to {interval.high:.1f}"
        human = NOTHING if e.human_normalized != e.human_normalized else f"{e.human_normalized:.3f}"
        cut = f"{sum(e.truncated)} of {len(e.truncated)}"
        rows.append(
            (
                e.environment,
                f"{e.epsilon:g}",
                str(len(e.returns)),
                f"{e.mean:.1f}",
                spread,
                f"{e.median:.1f}",
                f"{e.iqm:.1f}",
                f"{min(e.returns):g} to {max(e.returns):g}",
                human,
                cut,
            )
        )
    return Table(
        title="Returns of whole episodes",
        columns=("environment", "ε", "episodes", "mean", "95 %", "median", "IQM", "range", "human = 1", "cut short"),
        rows=tuple(rows),
        notes=(
            "true rewards, sticky actions; the first episodes that start, whether short or long",
            "95 %: bootstrap interval of the mean over episodes of these weights; another training run may lie outside",
        ),
    )


def evaluation_records(
    evaluations: Sequence[Evaluation], environment: Environment, *, max_steps: int | None, device: str
) -> tuple[Record, ...]:
    """A record of each evaluation, with the returns and lengths of all its episodes.

    Args:
        evaluations: what was played.
        environment: where.
        max_steps: agent steps after which an episode was cut short; None for the default.
        device: where the network was.
    """
    return tuple(
        Record(
            experiment="evaluate",
            row=f"{e.environment}, ε = {e.epsilon:g}",
            round=0,
            seed=e.seed,
            settings={
                "env": e.environment,
                "epsilon": e.epsilon,
                "episodes": len(e.returns),
                "max_steps": max_steps,
                "device": device,
            },
            values={
                "return_mean": e.mean,
                "return_iqm": e.iqm,
                "returns": list(e.returns),
                "lengths_agent_steps": [float(length) for length in e.lengths],
                "seconds": e.seconds,
            },
            environment=environment,
        )
        for e in evaluations
    )
