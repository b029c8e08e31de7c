"""`Rank`: what one rank of a training run has, built and closed.

first stage of a replica     stages of the learner, its replica's shards, their batches, and actors of its own
                             (--actors inline) or what it sees of an acting rank
other stages                 stages of the learner
acting rank                  actors, and weights that come from all stages
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpdqn.actors import Actors, Chunk
from mpdqn.arrangement import Arrangement
from mpdqn.cores import pin, restore
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.networks import noisy_layers, set_noise
from mpdqn.partition import counted_profile
from mpdqn.replay import Prefetcher, VirtualShards
from mpdqn.train.acting import Acting, LaggedWeights, RemoteActing, transitions_group
from mpdqn.train.batches import BatchQueue
from mpdqn.train.config import TrainJob
from mpdqn.weights import WeightDelivery
from mpdqn.workload.acceleration import agree_on_acceleration

ACTING = "acting"
"""What the noise is called with which a noisy network explores."""


class Rank:
    """What one rank of a run has. Building one is collective over the world.

    Attributes:
        owned: the virtual shards that this rank has or plays for.
        learner: its stages; None on an acting rank.
        shards: its part of replay, on the rank of a replica's first stage.
        queue: the batches that are drawn from them.
        acting: where their transitions come from: actors of its own or another rank's; an acting rank's own actors.
    """

    def __init__(self, world: World, job: TrainJob) -> None:
        """Build the learner, the shards or the actors that this rank has.

        Args:
            world: the ranks of the job, `TrainJob.num_ranks`.
            job: a checked run.
        """
        config, settings = job.config, job.settings
        self.world, self.job = world, job
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
        self._learners = world.group(plan.ranks, "gloo", "learners")
        self._everyone = world.group(range(world.size), "gloo", "rounds")
        if remote:
            transitions_group(world)
        self.acceleration = agree_on_acceleration(
            world,
            network,
            job.workload.micro_batch_frames(job.layout),
            precision=config.precision,
            compile=config.compile,
        )
        if world.device.type == "cuda":
            self.acceleration.set_products()
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
                config=job.workload.learner_config(lookahead=config.lookahead),
                table=self.arrangement.table,
                acceleration=self.acceleration,
            )
        if self.learner is not None and self.learner.owns_shards:
            self._own(self.learner, acting_network, owners_group, remote)
        elif remote and not mesh.member:
            assert acting_network is not None
            self.acting = Acting(self._make_actors(acting_network), LaggedWeights(acting_network, config.actor_lag))

    def _own(self, learner: Learner, acting: nn.Sequential | None, owners: Any, remote: bool) -> None:
        """Replay, batches and acting of the rank that has its replica's first stage."""
        job, config, settings = self.job, self.job.config, self.job.settings
        self.shards = job.workload.make_shards(owned=self.owned, directory=config.replay_dir)
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
        self.acting = Acting(self._make_actors(acting), weights)

    def _make_actors(self, network: nn.Sequential) -> Actors:
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
    frames = job.workload.micro_batch_frames(job.layout)
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
