"""`Trainer`: one rank of a training run. The whole wiring on one page.

    round r   acting ─ chunk r ─▶ shards            as many environments on every replica, all together V·E
              shards ─ draw, gather ─▶ batch ─▶ learner.learn      as often as the limiter says
              learner ─ |TD error| ─▶ shards
              learner ─ weights by name ─▶ acting   when they changed

Every decision is a function of counts, so that all ranks take it alike without asking.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpdqn.actors import Actors, Chunk
from mpdqn.allocator import keep_freed_memory
from mpdqn.arrangement import Arrangement
from mpdqn.cores import pin, restore
from mpdqn.dqn.batch import Batch
from mpdqn.learner import Learner, LearnerConfig, gather_by_name
from mpdqn.mesh import Mesh, World
from mpdqn.networks import noisy_layers, set_noise
from mpdqn.partition import counted_profile
from mpdqn.pipeline.acceleration import Acceleration, candidates, choose_acceleration
from mpdqn.replay import Prefetcher, VirtualShards
from mpdqn.train.acting import Acting, LaggedWeights, RemoteActing, act_remotely, send_chunk, transitions_group
from mpdqn.train.batches import BatchQueue
from mpdqn.train.check import check
from mpdqn.train.config import TrainConfig, TrainJob
from mpdqn.train.folder import save_batches
from mpdqn.train.step import NotANumber, TrainStep
from mpdqn.weights import WeightDelivery

T = TypeVar("T")

ACTING = "acting"
"""What the noise is called with which a noisy network explores."""


class Trainer:
    """One rank's part in a run; ``run`` is the loop. Building one is collective over the world.

    Attributes:
        owned: the virtual shards that this rank has or plays for.
        learner: its stages; None on an acting rank.
        shards: its part of replay, on the rank of a replica's first stage.
        queue: the batches that are drawn from them.
        acting: where their transitions come from: actors of its own or another rank's; an acting rank's own actors.
        first_round: the round with which `run` begins.
        before_storing: called before so many steps of every environment are stored; for whoever reads frames meanwhile.
        asked: what any rank was asked for in the round that was yielded last, the same on every rank.
    """

    def __init__(
        self, world: World, job: TrainJob, folder: Path | None = None, asked: Callable[[], int] = lambda: 0
    ) -> None:
        """Build the learner, the shards or the actors that this rank has.

        Args:
            world: the ranks of the job, `TrainJob.num_ranks`.
            job: a checked run.
            folder: where the batch of a failed update is kept; None keeps none.
            asked: what this rank is asked for, a number; ``self.asked`` is the largest of all ranks'.
        """
        config, settings = job.config, job.settings
        self.world, self.job, self.folder = world, job, folder
        self.asked, self._asked, self.first_round = 0, asked, 0
        self.before_storing: Callable[[int], None] = lambda steps: None
        self._stack = ExitStack()
        network = job.make_network()
        self._cores, self._threads = os.sched_getaffinity(0), torch.get_num_threads()
        acts_only = world.rank >= job.layout.ranks
        pin(list(job.cores), 1 if acts_only else job.layout.threads, world.rank)
        self.arrangement = arrange(job, network)
        plan = self.arrangement.plans[0]
        mesh = Mesh(world, plan, job.agent.letters)
        remote = config.actors == "workers"
        d = job.layout.data
        owners = [plan.replica(r)[0] for r in range(d)]
        self._acting_ranks = [job.layout.ranks + r for r in range(d)] if remote else owners
        self.owned = owned_shards(job, world.rank)
        self._delivery = WeightDelivery(world, plan, network, self._acting_ranks)
        owners_group = world.group(owners, "gloo")
        self._learners = world.meeting(plan.ranks)
        self._everyone = world.meeting(range(world.size))
        if remote:
            transitions_group(world)
        self.acceleration = self._accelerate(network)
        self.learner: Learner | None = None
        self.shards: VirtualShards | None = None
        self.queue: BatchQueue | None = None
        self.acting: Acting | RemoteActing | None = None
        self._owner_of = owners
        acting_network = job.make_network() if world.rank in self._acting_ranks else None
        if mesh.member:
            self.learner = Learner(
                network,
                mesh=mesh,
                agent=job.agent,
                batch_size=settings.batch_size,
                observation_shape=job.spec.observation_shape,
                config=LearnerConfig(
                    learning_rate=settings.learning_rate,
                    adam_eps=settings.adam_eps,
                    target_period=settings.target_period,
                    target_tau=settings.target_tau,
                    max_grad_norm=settings.max_grad_norm,
                    lookahead=config.lookahead,
                    seed=config.seed,
                ),
                table=self.arrangement.table,
                acceleration=self.acceleration,
            )
        if self.learner is not None and self.learner.owns_shards:
            self._own(self.learner, acting_network, owners_group, remote)
        elif remote and not mesh.member:
            assert acting_network is not None
            self.acting = Acting(self._play(acting_network), LaggedWeights(acting_network, config.actor_lag))

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

    def _accelerate(self, network: nn.Sequential) -> Acceleration:
        """How the layers are computed, as rank 0 finds it out on the whole network. Collective over the world."""
        config, spec = self.job.config, self.job.spec
        tried = candidates(
            "float32" if config.device == "cpu" and config.precision == "auto" else config.precision,
            "off" if config.device == "cpu" and config.compile == "auto" else config.compile,
        )
        chosen: Acceleration | None = None
        if self.world.rank == 0 and len(tried) > 1:
            micro = self.job.settings.batch_size // (self.job.layout.data * self.job.layout.num_microbatches)
            frames = torch.zeros((micro, *spec.observation_shape), dtype=torch.uint8, device=self.world.device)
            chosen = choose_acceleration(tried, copy.deepcopy(network).to(self.world.device), frames)
        acceleration = tried[0] if len(tried) == 1 else self.world.from_first(chosen)
        assert acceleration is not None
        if self.world.device.type == "cuda":
            acceleration.set_products()
        return acceleration

    def _own(self, learner: Learner, acting: nn.Sequential | None, owners: Any, remote: bool) -> None:
        """Replay, batches and acting of the rank that has its replica's first stage."""
        job, config, settings = self.job, self.job.config, self.job.settings
        self.shards = VirtualShards(
            observation_shape=job.spec.observation_shape,
            num_shards=config.num_shards,
            capacity=settings.capacity,
            envs_per_shard=config.envs_per_shard,
            seed=config.seed,
            stack=job.spec.stack,
            n_step=settings.n_step,
            discount=settings.discount,
            clip_rewards=settings.clip_rewards,
            prioritization=settings.prioritization,
            action_shape=job.spec.action_shape,
            directory=config.replay_dir,
            owned=self.owned,
        )
        prefetcher = self._stack.enter_context(Prefetcher(self.world.device, getattr(torch, config.dtype)))
        self.queue = BatchQueue(
            self.shards,
            batch_size=settings.batch_size,
            lookahead=config.lookahead,
            prefetch=config.prefetch,
            prefetcher=prefetcher,
            agree=lambda lowest: _least(lowest, owners),
        )
        if remote:
            example = self._example(len(self.owned) * config.envs_per_shard)
            self.acting = RemoteActing(self.world, self._acting_ranks[learner.mesh.replica], example)
            return
        assert acting is not None
        whole = len(learner.stages) == self.arrangement.plans[0].partition.num_stages
        weights: LaggedWeights | None = None
        if whole and not config.actor_lag:
            acting = nn.Sequential()  # the learner's own layers: what it learns is played at once
            for stage in learner.stages:
                for name, layer in stage.online.named_children():
                    acting.add_module(name, layer)
        else:
            acting = acting.to(self.world.device)
            weights = LaggedWeights(acting, config.actor_lag)
        self.acting = Acting(self._play(acting), weights)

    def _play(self, network: nn.Sequential) -> Actors:
        job, config = self.job, self.job.config
        return Actors(
            network,
            config.env,
            owned=self.owned,
            num_shards=config.num_shards,
            envs_per_shard=config.envs_per_shard,
            epsilon=job.settings.epsilon,
            seed=config.seed,
            greedy=job.agent.greedy,
            before_step=(lambda step: set_noise(network, config.seed, step, ACTING)) if noisy_layers(network) else None,
            device=self.world.device if config.actors == "inline" else "cpu",
            workers=config.env_workers,
            steps=config.round_steps,
        )

    def _example(self, num_envs: int) -> Chunk:
        """A chunk with the shapes and dtypes of those that will come."""
        spec, lead = self.job.spec, (self.job.config.round_steps, num_envs)
        frame = torch.empty(
            *lead, spec.observation_shape[0] // spec.stack, *spec.observation_shape[1:], dtype=torch.uint8
        )
        flag = torch.empty(lead, dtype=torch.bool)
        action = torch.empty(*lead, *spec.action_shape, dtype=torch.int64)
        reward = torch.empty(lead, dtype=torch.float32)
        return Chunk(frame=frame, action=action, reward=reward, terminated=flag, truncated=flag, next_frame=frame)

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
        """Meet all ranks where there is time, as one may be playing for longer than a message waits.

        There each hears what any of them was asked for.
        """
        asked = torch.tensor(self._asked())
        if self.world.size > 1:
            group, complaint = self._everyone, f"rank {self.world.rank} waited in vain for all ranks to have played"
            self.world.start(
                lambda: dist.all_reduce(asked, dist.ReduceOp.MAX, group=group, async_op=True),
                asked,
                group,
                complaint,
                patient=True,
            ).wait()
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
                batch, upcoming = self.queue.batches(update)
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
        return gather_by_name(self.learner, state)

    def to_first(self, value: T) -> list[T | None]:
        """What every learner rank has, on rank 0; an empty list elsewhere. Collective over them; plain values only."""
        assert self.learner is not None
        ranks = self.learner.mesh.plan.ranks
        values: list[T | None] | None = [None] * len(ranks) if self.world.rank == ranks[0] else None
        dist.gather_object(value, values, dst=ranks[0], group=self._learners)
        return values or []

    def close(self) -> None:
        """Stop actors and threads; a second call does nothing."""
        if self.acting is not None:
            self.acting.close()
        self._stack.close()
        restore(self._cores, self._threads)


def owned_shards(job: TrainJob, rank: int) -> range:
    """The virtual shards of ``rank``: those of its replica, where it has the first stage or acts for it; else none."""
    replicas = range(job.layout.data)
    first = [job.layout.ranks // job.layout.data * r for r in replicas]
    owners = first + [job.layout.ranks + r for r in replicas] * (job.num_ranks > job.layout.ranks)
    if rank not in owners:
        return range(0)
    share, replica = job.config.num_shards // job.layout.data, owners.index(rank) % job.layout.data
    return range(replica * share, (replica + 1) * share)


def arrange(job: TrainJob, network: nn.Sequential) -> Arrangement:
    """Plan and action table of the job's layout, from counted costs, hence the same in every run."""
    micro = job.settings.batch_size // (job.layout.data * job.layout.num_microbatches)
    frames = torch.zeros((micro, *job.spec.observation_shape), dtype=torch.uint8)
    return Arrangement.of(
        job.layout,
        counted_profile(network, frames, name=job.network_name),
        job.agent,
        batch_size=job.settings.batch_size,
        lookahead=job.config.lookahead,
        recompute=job.config.recompute,
        memory_bytes=float("inf"),
    )


def _least(value: float, group: Any) -> float:
    """The least ``value`` of the ranks of ``group``. Collective over them."""
    if dist.get_world_size(group) == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return float(least)
