"""`Trainer`: one rank of a training run. The whole wiring on one page.

    round r   acting ─ chunk r ─▶ shards            as many environments on every replica, all together V·E
              shards ─ draw, gather ─▶ batch ─▶ learner.learn      as often as the limiter says
              learner ─ |TD error| ─▶ shards
              learner ─ weights by name ─▶ acting   when they changed

Every decision is a function of counts, so that all ranks take it alike without asking, but for one: whether a rank was
asked to write a checkpoint or to stop, which all hear of once a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mpdqn.actors import Chunk
from mpdqn.allocator import keep_freed_memory
from mpdqn.dqn.batch import Batch
from mpdqn.learner import Learner, gather_by_name
from mpdqn.mesh import World
from mpdqn.train.acting import Acting, RemoteActing, act_remotely, send_chunk
from mpdqn.train.check import check
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.folder import save_batches
from mpdqn.train.rank import Rank
from mpdqn.train.step import NotANumber, TrainStep

T = TypeVar("T")


class Trainer(Rank):
    """One rank's part in a run; ``run`` is the loop. Building one is collective over the world.

    Attributes:
        first_round: the round with which `run` begins.
        before_storing: called before so many steps of every environment are stored; for whoever reads frames meanwhile.
        asked: what any rank was asked for in the round that was yielded last, the same on every rank.
    """

    def __init__(
        self, world: World, job: TrainJob, folder: Path | None = None, asked: Callable[[], int] = lambda: 0
    ) -> None:
        """Build what this rank has.

        Args:
            world: the ranks of the job, `TrainJob.num_ranks`.
            job: a checked run.
            folder: where the batch of a failed update is kept; None keeps none.
            asked: what this rank is asked for, a number; ``self.asked`` is the largest of all ranks'.
        """
        super().__init__(world, job)
        self.folder, self._asked, self.asked = folder, asked, 0
        self.first_round = 0
        self.before_storing: Callable[[int], None] = lambda steps: None

    @classmethod
    @contextmanager
    def alone(cls, config: TrainConfig, folder: Path | None = None) -> Iterator[Trainer]:
        """The only rank of a run on one process, as a context.

        Raises:
            ValueError: for bad input, or a layout of more ranks.
        """
        job = check(config)
        if job.num_ranks > 1:
            raise ValueError(f"layout {job.layout.name} needs {job.num_ranks} ranks; `train` starts them")
        keep_freed_memory()
        with World.open(config.device, config.timeout) as world:
            trainer = cls(world, job, folder)
            try:
                yield trainer
            finally:
                trainer.close()

    def run(self) -> Iterator[TrainStep]:
        """Train round after round. On an acting rank a step has counts only.

        Raises:
            NotANumber: at a loss that is no number, its batch saved.
            PeerLost: if another rank is gone or silent.
        """
        job, lag, rounds = self.job, self.job.config.actor_lag, range(self.first_round, self.job.num_rounds)
        if self.learner is None:
            assert isinstance(self.acting, Acting)
            replica = self.world.rank - job.layout.ranks
            for r in act_remotely(
                self.world,
                self.acting,
                self._delivery,
                replica=replica,
                owner=self._owner_of[replica],
                rounds=rounds,
                lag=lag,
                due=self._due,
                plays_after=job.plays_after,
                agree=self._agree,
            ):
                yield self._step(r)
            return
        learner = self.learner
        if lag and self.acting is not None:
            self.acting.start()
        for r in rounds:
            chunk: Chunk | None = None
            self.world.activity.set(f"playing round {r}")
            if not lag:
                self._deliver(learner, r)
            if self.acting is not None and self.queue is not None and self.shards is not None:
                chunk = self.acting.chunk()
                self.queue.settle()
                self.before_storing(job.config.round_steps)
                chunk.store(self.shards)
            if lag and job.plays_after(r):
                self._deliver(learner, r)
                if self.acting is not None:
                    self.acting.start()
            self._agree()
            yield self._learn(learner, r, chunk)

    def play_besides(self, rounds: int) -> None:
        """Play and store so many rounds that do not count, on a replica's first rank and on its acting rank."""
        for _ in range(rounds):
            if isinstance(self.acting, RemoteActing):
                chunk = self.acting.chunk()
            else:
                assert self.acting is not None
                steps = self.acting.actors.steps_played
                chunk = self.acting.actors.play()
                self.acting.actors.steps_played = steps
            if self.shards is not None:
                chunk.store(self.shards)
            else:
                send_chunk(self.world, chunk, self._owner_of[self.world.rank - self.job.layout.ranks])

    def _agree(self) -> None:
        """Hear what any rank was asked for, once a round."""
        asked = torch.tensor(self._asked())
        if self.world.size > 1:
            with self.world.waiting("waiting for all ranks to have played"):
                dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._everyone)
        self.asked = int(asked)

    def _due(self, r: int) -> bool:
        """Whether the weights have changed in the round before ``r``."""
        return r > 0 and self.job.updates_after(r) > self.job.updates_after(r - 1)

    def _deliver(self, learner: Learner, r: int) -> None:
        """The weights of after round r − 1, if they are due, on their way to whoever acts for this replica."""
        weights: dict[str, Tensor] | None = None
        if self._due(r):
            self._delivery.send(learner)
            if isinstance(self.acting, Acting) and self.acting.needs_weights:
                local = {n: t for stage in learner.stages for n, t in stage.online.state_dict().items()}
                weights = self._delivery.receive(learner.mesh.replica, local)
        if self.acting is not None:
            self.acting.deliver(weights)

    def _learn(self, learner: Learner, r: int, chunk: Chunk | None) -> TrainStep:
        """The updates that are due after round r's chunk."""
        job = self.job
        losses, norms, batches, late, sent = [], [], [], 0, 0
        for update in range(job.updates_after(r), job.updates_after(r + 1)):
            batch: Batch | None = None
            upcoming: Batch | None = None
            if self.queue is not None:
                self.world.activity.set(f"drawing the batch of update {update + 1}")
                batch, upcoming = self.queue.batches(update)
            self.world.activity.set(f"learning update {update + 1}")
            step = learner.learn(batch, upcoming)
            losses.append(step.loss)
            norms.append(step.grad_norm)
            if batch is not None:
                batches.append(batch)
            if self._looks_at_once:
                self._check_numbers(learner, losses, norms, batches)
            if self.queue is not None and batch is not None:
                self.queue.learned(batch, step)
            late, sent = late + step.late_passes, sent + step.bytes_sent
        self._check_numbers(learner, losses, norms, batches)
        done = self._step(r, chunk)
        return replace(done, losses=tuple(losses), grad_norms=tuple(norms), late_passes=late, bytes_sent=sent)

    def _step(self, r: int, chunk: Chunk | None = None) -> TrainStep:
        """What there is to say of round ``r`` without its updates."""
        job = self.job
        return TrainStep(
            round=r,
            transitions=(r + 1) * job.transitions_per_round,
            frames=job.frames_after(r + 1),
            updates=job.updates_after(r + 1),
            epsilon=job.settings.epsilon(job.frames_after(r + 1)),
            losses=(),
            grad_norms=(),
            episodes=chunk.episodes if chunk else (),
            restarts=chunk.restarts if chunk else 0,
            actor_lag=job.updates_after(r) - job.updates_after(max(0, r - job.config.actor_lag)),
            late_passes=0,
            bytes_sent=0,
        )

    @property
    def _looks_at_once(self) -> bool:
        """Whether each loss is looked at: on a GPU that holds the host, but priorities are fetched there anyway."""
        return self.world.device.type == "cpu" or self.job.settings.prioritization is not None

    def _check_numbers(self, learner: Learner, losses: list[Tensor], norms: list[Tensor], batches: list[Batch]) -> None:
        """End the run, on every rank, if one of a round's losses or norms so far is no number."""
        if not losses or bool(torch.stack([*losses, *norms]).isfinite().all()):
            return
        bad = next(i for i, (a, b) in enumerate(zip(losses, norms, strict=True)) if not (a + b).isfinite())
        update = learner.update - len(losses) + bad + 1
        where = ""
        if self.folder is not None and batches:
            save_batches(self.folder, self.world.rank, update, batches[bad:], dict(learner.named_parameters()))
        if self.folder is not None:
            where = f"; its batch and the weights after it are in {self.folder}/failed-update-{update}-rank*.pt"
        if dist.get_world_size(self._learners) > 1:
            with self.world.waiting("waiting for all learners to save a failed update"):
                dist.barrier(self._learners)  # the first rank that raises ends the others, which may still be writing
        raise NotANumber(
            f"update {update} has loss {losses[bad].item()} and gradient norm {norms[bad].item()}{where}; "
            "look at rewards and learning_rate"
        )

    def weights(self) -> dict[str, Tensor]:
        """The online weights of replica 0 by name, on the CPU, on the lowest learner rank; empty elsewhere.

        Collective over the learner ranks.
        """
        if self.learner is None:
            return {}
        if self.acting is not None:
            self.acting.settle()
        state = {name: t for stage in self.learner.stages for name, t in stage.online.state_dict().items()}
        with self.world.waiting("waiting for the weights of all stages"):
            return gather_by_name(self.learner, state)

    def to_first(self, value: T) -> list[T | None]:
        """What every learner rank has, on rank 0; an empty list elsewhere. Collective over them; plain values only."""
        assert self.learner is not None
        ranks = self.learner.mesh.plan.ranks
        values: list[T | None] | None = [None] * len(ranks) if self.world.rank == ranks[0] else None
        with self.world.waiting("waiting for all learners' progress"):
            dist.gather_object(value, values, dst=ranks[0], group=self._learners)
        return values or []
