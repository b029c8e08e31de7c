"""`train`: a training run from its configuration to its folder.

check ─▶ launch ─▶ on every rank: Trainer.run ─▶ progress, evaluations ─▶ weights.pt, policy.pt2, records.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpdqn.actors import Episode
from mpdqn.allocator import keep_freed_memory
from mpdqn.evaluate import Evaluation, evaluate
from mpdqn.launch import launch
from mpdqn.logs import Logs, open_logs
from mpdqn.mesh import World, launched
from mpdqn.records import RECORDS, Record, append_records
from mpdqn.train.check import check
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.folder import POLICY, new_folder, save_policy, save_weights, write_config
from mpdqn.train.loop import Trainer
from mpdqn.train.progress import Progress

MOST_FRAMES = 108_000
"""Frames after which an evaluation episode is cut short, as Atari's are: a greedy policy may stand still for ever."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    ``folder`` holds its files. ``episodes`` are all that ended, by step and environment; ``evaluation`` is that of the
    final weights, None without one. ``rows`` are the progress.
    """

    folder: Path
    episodes: tuple[Episode, ...]
    evaluation: Evaluation | None
    rows: tuple[dict[str, float], ...]

    def summary(self) -> str:
        """What to tell a user at the end: how well it plays, and how to use the weights without mpdqn."""
        last = next((row for row in reversed(self.rows) if "mean_return" in row), None)
        trained = f"mean return {last['mean_return']:.4g} of the last {last['episodes']:.0f} episodes" if last else ""
        lines = [f"{len(self.episodes)} episodes{f', {trained}' if trained else ''}"]
        if self.evaluation is not None:
            n, epsilon = len(self.evaluation.returns), self.evaluation.epsilon
            lines.append(f"evaluation: mean return {self.evaluation.mean:.4g} of {n} episodes with ε = {epsilon:g}")
        lines += [
            "",
            f"Written to {self.folder}/. Without mpdqn:",
            "    import torch",
            f'    policy = torch.export.load("{self.folder / POLICY}").module()',
            "    values = policy(frames)  # uint8 [B, C, H, W]",
        ]
        return "\n".join(lines)


def train(config: TrainConfig | None = None, **settings: Any) -> TrainResult:
    """Train as ``mpdqn train`` does.

    Started by torchrun, every process calls this alike; rank 0 has the result, the others an empty one.

    Args:
        config: what to train; DQN on Pong by default.
        settings: other fields of `TrainConfig`.

    Raises:
        ValueError: for bad input, before any work.
        mpdqn.train.loop.NotANumber: at a loss that is no number.
        mpdqn.launch.WorkerError: if a worker fails, with its own error first.
    """
    job = check(replace(config or TrainConfig(), **settings))
    if launched() or job.num_ranks == 1:
        return train_rank(job)
    results: list[TrainResult] = launch(train_rank, job, num_workers=job.num_ranks, port=job.config.port)
    return results[0]


def train_rank(job: TrainJob) -> TrainResult:
    """This rank's part in a run. Collective over the ranks of the job."""
    keep_freed_memory()
    with World.open(job.config.device, job.config.timeout) as world:
        return train_in(world, job)


def train_in(world: World, job: TrainJob) -> TrainResult:
    """This rank's part in a run of a world that is open already, and stays so. Collective over its ranks."""
    folder = world.from_first(new_folder(job) if world.rank == 0 else Path())
    trainer = Trainer(world, job, folder)
    try:
        result = _Session(trainer, folder).run()
    finally:
        trainer.close()
    world.barrier()
    return result


class _Session:
    """What goes on around the loop: rows, evaluations and the run's folder, all on rank 0."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self._folder, self._job = trainer, folder, trainer.job
        self._first = trainer.world.rank == 0
        self._episodes: list[Episode] = []
        self._rows: list[dict[str, float]] = []
        self._evaluation: Evaluation | None = None

    def run(self) -> TrainResult:
        job, begin = self._job, time.perf_counter()
        with ExitStack() as stack:
            logs: Logs | None = None
            if self._first:
                write_config(self._folder, job, json.loads(self._trainer.arrangement.plans[0].to_json()))
                logs = stack.enter_context(
                    open_logs(
                        self._folder, wandb=job.config.wandb, config=asdict(job.config) | {"layout": job.layout.name}
                    )
                )
            total = job.frames_after(job.num_rounds)
            bar = stack.enter_context(
                tqdm(total=total, unit=" frames", unit_scale=True, disable=not self._first, file=sys.stderr)
            )
            progress = Progress(job.settings.batch_size)
            for step in self._trainer.run():
                progress.add(step)
                bar.update(step.frames - bar.n)
                evaluates = job.evaluates_after(step.round)
                if evaluates or job.logs_after(step.round):
                    row = self._row(progress)
                    if evaluates:
                        begun = time.perf_counter()
                        row |= self._evaluate()
                        progress.resume()
                        begin += time.perf_counter() - begun
                    if logs is not None:
                        logs.write(step.frames, row)
                        bar.set_postfix_str(_postfix(row))
                    self._rows.append({"frames": float(step.frames), **row})
        if self._trainer.learner is not None:
            self._finish(time.perf_counter() - begin)
        return TrainResult(
            folder=self._folder,
            episodes=tuple(self._episodes),
            evaluation=self._evaluation,
            rows=tuple(self._rows),
        )

    def _row(self, progress: Progress) -> dict[str, float]:
        """A row of all replicas, on rank 0; the other ranks' is their own part."""
        own = progress.take()
        parts = [part for part in self._trainer.to_first(own) if part is not None] or [own]
        episodes = sorted((e for part in parts for e in part[0]), key=lambda e: (e.step, e.environment))
        self._episodes += episodes
        return progress.row(episodes, sum(part[1] for part in parts))

    def _evaluate(self) -> dict[str, float]:
        """Play evaluation episodes on rank 0 with the weights of now, while the others wait."""
        job, world = self._job, self._trainer.world
        weights = self._trainer.weights()
        if self._first:
            save_weights(self._folder, weights)  # whatever may happen in the evaluation
            network = job.make_network()
            network.load_state_dict(weights)
            self._evaluation = evaluate(
                network.to(world.device),
                job.config.env,
                episodes=job.config.evaluation_episodes,
                epsilon=job.settings.evaluation_epsilon,
                seed=job.config.seed,
                greedy=job.agent.greedy,
                device=world.device,
                max_steps=MOST_FRAMES // job.spec.frames_per_action,
                workers=job.config.env_workers,
            )
        world.barrier()
        if self._evaluation is None:
            return {}
        return {"evaluation_return": self._evaluation.mean, "evaluation_episodes": len(self._evaluation.returns)}

    def _finish(self, seconds: float) -> None:
        """Weights, exported policy and record of the run. Collective over the learner ranks."""
        job, weights = self._job, self._trainer.weights()
        if not self._first:
            return
        save_weights(self._folder, weights)
        last = next((row for row in reversed(self._rows) if "mean_return" in row), {})
        returns = self._evaluation.returns if self._evaluation is not None else ()
        config = job.config
        record = Record(
            experiment="train",
            row=f"{config.env} {config.agent}",
            round=0,
            seed=config.seed,
            settings=job.record_settings() | {"precision": str(self._trainer.acceleration)},
            values={
                "frames": job.frames_after(job.num_rounds),
                "updates": job.updates_after(job.num_rounds),
                "seconds": seconds,
                "episodes": len(self._episodes),
                "mean_return": last.get("mean_return"),
                "evaluation_returns": [float(r) for r in returns],
                "evaluation_epsilon": job.settings.evaluation_epsilon,
            },
            environment=job.environment,
        )
        append_records(self._folder / RECORDS, [record])
        network = job.make_network()
        network.load_state_dict(weights)
        save_policy(self._folder, network, job.agent, job.spec)


def _postfix(row: Mapping[str, float]) -> str:
    """What the progress bar says beside the frames."""
    text = f"{row['updates_per_s']:.1f} updates/s · {row['samples_per_insert']:.2g} samples/insert"
    text += f" · ε {row['epsilon']:.3f}"
    for name, label in (("loss", "loss"), ("mean_return", "return"), ("evaluation_return", "evaluation")):
        if name in row:
            text += f" · {label} {row[name]:.4g}"
    return text
