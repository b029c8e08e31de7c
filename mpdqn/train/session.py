"""`Session`: what goes on around the loop of a run: rows, evaluations, checkpoints, and the run's folder."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpdqn.actors import Episode
from mpdqn.checkpoint.loader import Choice, on_every_rank
from mpdqn.checkpoint.manifest import WrongCheckpoint
from mpdqn.checkpoint.saver import NotSaved
from mpdqn.evaluate import Evaluation, evaluate
from mpdqn.logs import PROGRESS, Logs, open_logs, read_progress
from mpdqn.mesh import World
from mpdqn.progress_bar import ProgressBar
from mpdqn.records import Record, without_places
from mpdqn.train.acting import episode_rows, episodes_of
from mpdqn.train.checkpoints import STOP, Checkpoints, asked_for, go_on
from mpdqn.train.config import TrainJob
from mpdqn.train.folder import POLICY, save_policy, save_weights, write_config, write_record
from mpdqn.train.loop import Trainer
from mpdqn.train.progress import Progress
from mpdqn.train.recorded import CONFIG
from mpdqn.train.status import FAILED, FINISHED, RUNNING, STOPPED, now
from mpdqn.train.step import TrainStep
from mpdqn.train.stop import StopSignal


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    ``folder`` holds its files. ``episodes`` are all that ended, by step and environment; ``evaluation`` is that of the
    final weights, None without one. ``rows`` are the progress. ``stopped_at`` are the frames of the checkpoint at which
    it was asked to stop; None if it came to its end.
    """

    folder: Path
    episodes: tuple[Episode, ...]
    evaluation: Evaluation | None
    rows: tuple[dict[str, float], ...]
    stopped_at: int | None = None

    def summary(self) -> str:
        """What to tell a user at the end: how well it plays, and how to use the weights without mpdqn."""
        if self.stopped_at is not None:
            return f"Stopped at {self.stopped_at} frames, all of them kept. Go on: mpdqn train --resume {self.folder}"
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


class Session:
    """What goes on around the loop: rows, evaluations, checkpoints and the run's folder, all told on rank 0."""

    def __init__(self, world: World, job: TrainJob, folder: Path, run: str, stop: StopSignal) -> None:
        self._world, self._folder, self._job, self._run, self._stop = world, folder, job, run, stop
        self._first = world.rank == 0
        self._episodes: list[Episode] = []
        self._rows: list[dict[str, float]] = []
        self._evaluation: Evaluation | None = None
        self._checkpoints: Checkpoints | None = None
        self._resumed, self._lost = 0, ()
        self._step: TrainStep | None = None

    def run(self, choice: Choice | None) -> TrainResult:
        """The run from its beginning, or from the checkpoint ``choice``."""
        try:
            with ExitStack() as stack:
                stack.enter_context(self._world.on_loss(lambda problem: self._tell(FAILED, f"PeerLost: {problem}")))
                trainer = Trainer(self._world, self._job, self._folder, self._asked)
                stack.callback(trainer.close)
                return self._run_with(trainer, choice, stack)
        except BaseException as error:
            if self._world.size == 1 and self._checkpoints is not None:  # else its peers may be gone
                self._checkpoints.wait()
            if self._first and (self._folder / CONFIG).exists():
                self._tell(FAILED, f"{type(error).__name__}: {error}")
            raise

    def _run_with(self, trainer: Trainer, choice: Choice | None, stack: ExitStack) -> TrainResult:
        job, self._trainer = self._job, trainer
        progress = self._progress = Progress(job.settings.batch_size)
        earlier = self._load(choice)
        begin = time.perf_counter() - earlier
        frames = job.frames_after(trainer.first_round)
        logs: Logs | None = None
        if self._first:
            write_config(self._folder, job, json.loads(trainer.arrangement.plans[0].to_json()), self._run)
            self._tell(RUNNING)
            about = without_places(asdict(job.config) | {"layout": job.layout.name})
            logs = stack.enter_context(
                open_logs(
                    self._folder,
                    wandb=job.config.wandb,
                    config=about,
                    resume_at=frames if job.config.resume is not None else None,
                )
            )
        total = job.frames_after(job.num_rounds)
        bar = stack.enter_context(
            ProgressBar(total=total, initial=frames, unit=" frames", unit_scale=True, disable=not self._first)
        )
        self._checkpoints = checkpoints = Checkpoints(trainer, self._folder, self._run, choice)
        for step in trainer.run():
            self._step = step
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
            done = step.round + 1 == job.num_rounds
            if (trainer.asked and not done) or job.checkpoints_after(step.round):
                self._save(step, time.perf_counter() - begin)
            if checkpoints.look() or evaluates or job.logs_after(step.round):
                self._tell(RUNNING)
            if trainer.asked == STOP and not done:
                checkpoints.wait()
                return self._stopped(step)
        if self._step is None and job.config.evaluation_episodes:  # killed between its last checkpoint and its end
            self._evaluate()
        if trainer.learner is not None:
            self._finish(time.perf_counter() - begin)
        checkpoints.wait()
        if job.config.checkpoint_at_end and checkpoints.problem:
            raise NotSaved(f"the run came to its end, but {checkpoints.problem}")
        self._tell(FINISHED)
        self._world.barrier()  # all that it came to is written
        if not job.config.checkpoint_at_end:
            checkpoints.remove()
        return self._result()

    def _asked(self) -> int:
        return asked_for(self._checkpoints, self._stop, self._world.rank)

    def _load(self, choice: Choice | None) -> float:
        """Go on from ``choice``; the seconds that were trained before it. Collective over the world."""
        if choice is None:
            return 0.0
        self._world.activity.set(f"loading {choice.folder.name}")
        besides, counters = go_on(self._trainer, choice), choice.manifest.counters
        self._lost = tuple(sorted({*counters["replay_lost"], *choice.gone}))
        self._resumed = counters["resumed"] + 1
        with on_every_rank(self._world, choice):
            return self._take(besides, counters, choice.manifest.frames) if self._first else 0.0

    def _take(self, besides: Mapping[str, Tensor], counters: Mapping[str, Any], frames: int) -> float:
        """Take rows and episodes up to ``frames`` frames, on rank 0; the seconds that were trained before."""
        path = self._folder / PROGRESS
        try:
            rows = read_progress(self._folder) if path.is_file() else []  # the run may have had none yet
        except ValueError as error:  # which says nothing about the checkpoint
            raise WrongCheckpoint(f"{error}; mend or delete {path}") from error
        self._rows = [row for row in rows if row["frames"] <= frames]
        self._episodes = list(episodes_of(besides["run.episodes"]))
        row = {"losses": besides["run.losses"], "norms": besides["run.norms"]}
        self._progress.load_state(row, counters, episodes_of(besides["run.pending"]))
        return float(counters["seconds"])

    def _save(self, step: TrainStep, seconds: float) -> None:
        """Begin to write a checkpoint. Collective over the world."""
        assert self._checkpoints is not None
        self._world.activity.set("starting a checkpoint")
        own, _ = self._progress.take()
        pending = [] if self._trainer.learner is None else self._trainer.to_first(own)
        row, counters = self._progress.state()
        state: dict[str, Tensor] = {}
        if self._first:
            ended = [e for part in pending for e in part or []]
            state = {f"run.{name}": values for name, values in row.items()}
            state |= {"run.episodes": episode_rows(self._episodes), "run.pending": episode_rows(ended)}
            counters |= {"seconds": seconds, "resumed": self._resumed, "replay_lost": list(self._lost)}
        self._checkpoints.start(step.round + 1, state, counters)

    def _stopped(self, step: TrainStep) -> TrainResult:
        """The end of a run that was asked to stop."""
        assert self._checkpoints is not None
        if problem := self._checkpoints.problem:
            raise NotSaved(f"asked to stop, but {problem}")
        self._tell(STOPPED)
        return replace(self._result(), stopped_at=step.frames)

    def _result(self) -> TrainResult:
        return TrainResult(
            folder=self._folder,
            episodes=tuple(self._episodes),
            evaluation=self._evaluation,
            rows=tuple(self._rows),
        )

    def _tell(self, state: str, problem: str = "") -> None:
        """Write the run's status, on rank 0."""
        if not self._first:
            return
        job, step, saved = self._job, self._step, self._checkpoints.last if self._checkpoints else None
        checkpoint: dict[str, float] = {}
        if saved is not None and saved.manifest is not None:
            m = saved.manifest
            checkpoint = {"round": m.round, "frames": m.frames, "written": m.written, "seconds": saved.writing_s}
            checkpoint |= {"bytes": m.num_bytes, "frame_bytes": m.num_row_bytes}
        first = self._trainer.first_round if hasattr(self, "_trainer") else 0
        rounds = first if step is None else step.round + 1
        status = now(
            state=state,
            frames=job.frames_after(rounds),
            total_frames=job.frames_after(job.num_rounds),
            updates=job.updates_after(rounds),
            layout=job.layout.name,
            resumed=self._resumed,
            replay_lost=self._lost,
            row=self._rows[-1] if self._rows else {},
            checkpoint=checkpoint,
            problem=problem or (self._checkpoints.problem if self._checkpoints else ""),
        )
        with contextlib.suppress(OSError):  # a full disk says so elsewhere
            status.write(self._folder)

    def _row(self, progress: Progress) -> dict[str, float]:
        """A row of all replicas, on rank 0; the other ranks' is their own part."""
        own = progress.take()
        if self._trainer.learner is None:
            return progress.row(*own)
        parts = [part for part in self._trainer.to_first(own) if part is not None] or [own]
        episodes = sorted((e for part in parts for e in part[0]), key=lambda e: (e.step, e.environment))
        self._episodes += episodes
        return progress.row(episodes, sum(part[1] for part in parts))

    def _evaluate(self) -> dict[str, float]:
        """Play evaluation episodes on rank 0 with the weights of now, while the others wait."""
        job, world = self._job, self._trainer.world
        weights = self._trainer.weights()
        world.activity.set("evaluating")
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
                workers=job.config.env_workers,
            )
        world.barrier("waiting for the evaluation")
        if self._evaluation is None:
            return {}
        return {"evaluation_return": self._evaluation.mean, "evaluation_episodes": len(self._evaluation.returns)}

    def _finish(self, seconds: float) -> None:
        """Weights, exported policy and record of the run. Collective over the learner ranks."""
        job, weights = self._job, self._trainer.weights()
        learner = self._trainer.learner
        compiled = self._trainer.to_first(learner.compiled_modules) if learner is not None else []
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
                "compiled_modules": sum(count or 0 for count in compiled),
                "episodes": len(self._episodes),
                "mean_return": last.get("mean_return"),
                "evaluation_returns": [float(r) for r in returns],
                "evaluation_epsilon": job.settings.evaluation_epsilon,
            },
            environment=job.environment,
        )
        write_record(self._folder, record)
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
