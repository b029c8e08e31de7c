"""`Learner`: one update of the online network, the same path for every layout, the single process included.

batch ─▶ first stage ─ T, D, F ─▶ last stage: td_target, Huber loss, Σ w·loss / B_global
                     ◀─── B ────
per stage: Σ gradients over replicas ─▶ clip by the global norm ─▶ optimizer ─▶ every n updates target ← online
last stage ─ TD errors ─▶ first stage ─▶ shards
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpdqn.dqn.agents import Agent, Labels
from mpdqn.dqn.batch import Batch
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.mesh import LABELS, TD_ERRORS, Mesh, Message
from mpdqn.networks import check_exactness
from mpdqn.pipeline.runtime import Pipeline
from mpdqn.pipeline.stage import build_stages
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.schedule.tables import action_table
from mpdqn.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How an update is made.

    The defaults are Dopamine's DQN with Adam on Atari (Castro et al. 2018; Obando-Ceron & Castro 2021).
    ``target_period`` counts updates; ``max_grad_norm`` bounds the norm over *all* stages (inf: no clipping).

    Raises:
        ValueError: for a value that cannot be meant.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 6.25e-5
    adam_eps: float = 1.5e-4
    target_period: int = 2_000
    max_grad_norm: float = 10.0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose adam or sgd")
        for name in ("learning_rate", "adam_eps", "target_period", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be above 0")


@dataclass(frozen=True, kw_only=True)
class LearnStep:
    """What one update did.

    ``loss`` and ``grad_norm`` (before clipping) are scalars of the whole batch, the same on every rank. ``td_errors``
    [b] are those of this replica's part of the batch, on the rank of its first stage; None elsewhere. ``bytes_sent``
    counts what this rank sent.
    """

    update: int
    loss: Tensor
    grad_norm: Tensor
    td_errors: Tensor | None
    bytes_sent: int


class Learner:
    """This rank's stages of the online and target network, and their optimizer."""

    def __init__(
        self,
        network: nn.Sequential,
        *,
        mesh: Mesh,
        agent: Agent,
        batch_size: int,
        observation_shape: tuple[int, int, int],
        config: LearnerConfig | None = None,
    ) -> None:
        """Cut ``network`` and keep the stages of this rank, which must have a part in the mesh's plan.

        Args:
            network: the whole chain, equal on every rank (keyed initialisation sees to that).
            mesh: the plan, laid over the processes of the run.
            agent: which passes and which loss.
            batch_size: transitions in the whole batch, over all replicas.
            observation_shape: C, H, W.
            config: how an update is made.

        Raises:
            ValueError: if the batch does not divide into d·m micro-batches, or the network has layers under which
                layouts would not compute the same thing.
        """
        plan = mesh.plan
        plan.parallelism.check_batch(batch_size)
        check_exactness(network)
        self.config = config or LearnerConfig()
        self.mesh, self.plan, self.agent, self.batch_size = mesh, plan, agent, batch_size
        self.update = 0
        self.stopwatch = Stopwatch(mesh.rank, mesh.device)
        d, m = plan.parallelism.data, plan.parallelism.num_microbatches
        self._local_size, self._micro_size = batch_size // d, batch_size // (d * m)
        self.stages = build_stages(
            network, plan.partition, mesh.stages, observation_shape, self._micro_size, mesh.device
        )
        self._dtype = self.stages[0].value_dtype
        table = action_table(plan.parallelism.schedule, plan.parallelism.pipeline, m, agent.letters)
        passes = {p.letter: p.network for p in agent.passes}
        self._pipeline = Pipeline(mesh, self.stages, table, passes, m)
        self._exchange = SynchronousExchange(mesh)
        for stage in self.stages:
            if not any(p.requires_grad for _, p in stage.named_parameters()):
                layers = [name for name, _ in stage.online.named_children()]
                raise ValueError(
                    f"stage {stage.index} ({', '.join(layers)}) has 0 parameters to train; cut it elsewhere"
                )
        self._parameters = {stage.index: [p for _, p in stage.named_parameters()] for stage in self.stages}
        self._optimizer = _make_optimizer(list(self.parameters()), self.config)

    @property
    def owns_shards(self) -> bool:
        """Whether this rank holds its replica's first stage, and therefore its replay shards: it passes the batch."""
        return self.mesh.rank == self.mesh.first_rank

    @property
    def has_loss(self) -> bool:
        """Whether this rank holds its replica's last stage."""
        return self.mesh.rank == self.mesh.last_rank

    def parameters(self) -> Iterator[nn.Parameter]:
        """The online parameters of this rank's stages."""
        for stage in self.stages:
            yield from stage.online.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The online parameters of this rank's stages, under their global names."""
        for stage in self.stages:
            yield from stage.named_parameters()

    def learn(self, batch: Batch | None) -> LearnStep:
        """One update. Collective over the plan's ranks.

        Args:
            batch: this replica's B/d transitions, on the rank of its first stage; None on the other ranks.

        Raises:
            ValueError: if the batch is missing, unexpected or of the wrong size.
            PeerLost: if another rank is gone or silent.
        """
        self._check(batch)
        self.stopwatch.restart()
        self._optimizer.zero_grad(set_to_none=True)
        if batch is not None:
            batch = batch.to(self.mesh.device, self._dtype)
        labels, label_messages = self._pass_labels(batch)
        errors: dict[int, Tensor] = {}
        losses: dict[int, Tensor] = {}

        def loss_of(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            while label_messages:
                label_messages.pop().wait()
            rows = slice(i * self._micro_size, (i + 1) * self._micro_size)
            loss, errors[i] = self.agent.loss(q, values, _rows(labels, rows), self.batch_size)
            losses[i] = loss.detach()
            return loss

        obs, next_obs = (None, None) if batch is None else (batch.obs, batch.next_obs)
        self._pipeline.run(obs, next_obs, loss_of, self.stopwatch)
        td_errors, return_messages = self._return_td_errors([errors[i] for i in sorted(errors)])

        begin = self.stopwatch.now()
        self._exchange.reduce(self._parameters)
        loss, grad_norm = self._totals([losses[i] for i in sorted(losses)])
        self.stopwatch.mark("exchange", begin)
        begin = self.stopwatch.now()
        self._clip(grad_norm)
        self._optimizer.step()
        self.update += 1
        if self.update % self.config.target_period == 0:
            for stage in self.stages:
                stage.refresh_target()
        self.stopwatch.mark("optimizer", begin)

        for message in (*label_messages, *return_messages):
            message.wait()
        self.stopwatch.stop()
        return LearnStep(
            update=self.update,
            loss=loss,
            grad_norm=grad_norm,
            td_errors=td_errors if self.owns_shards else None,
            bytes_sent=self.mesh.reset_bytes(),
        )

    def timeline(self) -> Timeline:
        """What this rank did in its last update, and when."""
        return self.stopwatch.timeline()

    def _check(self, batch: Batch | None) -> None:
        rank = self.mesh.rank
        if (batch is not None) != self.owns_shards:
            have = "got a batch" if batch is not None else "got no batch"
            raise ValueError(
                f"rank {rank} {have}; rank {self.mesh.first_rank}, the first stage of its replica, passes the batch "
                "and the other ranks pass None"
            )
        if batch is not None and len(batch) != self._local_size:
            raise ValueError(
                f"rank {rank} got {len(batch)} transitions but a replica's part of batch_size {self.batch_size} is "
                f"{self._local_size} (d = {self.plan.parallelism.data})"
            )

    def _pass_labels(self, batch: Batch | None) -> tuple[Labels, list[Message]]:
        """Labels on their way from the first to the last stage: one row of actions, three of numbers."""
        device, size = self.mesh.device, self._local_size
        messages: list[Message] = []
        if batch is not None:
            action, numbers = batch.action, torch.stack([batch.reward, batch.discount, batch.weight])
        else:
            action = torch.empty(size, dtype=torch.int64, device=device)
            numbers = torch.empty((3, size), dtype=self._dtype, device=device)
        if self.owns_shards and not self.has_loss:
            messages += [self.mesh.send(t, self.mesh.last_rank, LABELS) for t in (action, numbers)]
        elif self.has_loss and not self.owns_shards:
            messages += [self.mesh.receive(t, self.mesh.first_rank, LABELS) for t in (action, numbers)]
        reward, discount, weight = numbers
        return Labels(action=action, reward=reward, discount=discount, weight=weight), messages

    def _return_td_errors(self, parts: list[Tensor]) -> tuple[Tensor, list[Message]]:
        """TD errors on their way from the last to the first stage."""
        if self.has_loss:
            errors = torch.cat(parts)
            if not self.owns_shards:
                return errors, [self.mesh.send(errors, self.mesh.first_rank, TD_ERRORS)]
            return errors, []
        errors = torch.empty(self._local_size, dtype=self._dtype, device=self.mesh.device)
        if self.owns_shards:
            return errors, [self.mesh.receive(errors, self.mesh.last_rank, TD_ERRORS)]
        return errors, []

    def _totals(self, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the gradient norm of the whole batch over all stages and replicas, alike on every rank."""
        zero = torch.zeros((), dtype=self._dtype, device=self.mesh.device)
        squares, loss = zero, torch.stack([zero, *losses]).sum()
        if self.mesh.replica == 0:  # after the exchange every replica holds the same gradients: count them once
            for parameters in self._parameters.values():
                gradients = [p.grad for p in parameters if p.grad is not None]
                squares = squares + nn.utils.get_total_norm(gradients).to(squares) ** 2
        totals = torch.stack([loss, squares])
        if len(self.plan.ranks) > 1:
            self.mesh.sum_over(self.mesh.layout_group, totals, "the sum of loss and gradient norm").wait()
        return totals[0], totals[1].sqrt()

    def _clip(self, grad_norm: Tensor) -> None:
        """Scale every gradient by min(1, max_grad_norm / grad_norm), as torch.nn.utils.clip_grad_norm_ does."""
        limit = self.config.max_grad_norm
        # On the CPU the norm is known: nothing to do where the factor is 1. On a GPU asking for it would hold the host.
        if limit < float("inf") and (grad_norm.device.type != "cpu" or limit < grad_norm.item() + 1e-6):
            nn.utils.clip_grads_with_norm_(self.parameters(), limit, grad_norm)


def gather_by_name(learner: Learner, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all stages of replica 0, by global name, on the layout's lowest rank; empty on the others.

    Collective over the plan's ranks. ``tensors`` are this rank's own, such as its gradients; they come to the CPU.
    """
    mesh = learner.mesh
    ranks = mesh.plan.ranks
    parts: list[dict[str, Tensor] | None] | None = [None] * len(ranks) if mesh.rank == ranks[0] else None
    own = {name: t.detach().cpu() for name, t in tensors.items()} if mesh.replica == 0 else {}
    if len(ranks) == 1:
        return own
    dist.gather_object(own, parts, dst=ranks[0], group=mesh.layout_group)
    return {name: t for part in parts or [] for name, t in (part or {}).items()}


def _rows(labels: Labels, rows: slice) -> Labels:
    return Labels(
        action=labels.action[rows],
        reward=labels.reward[rows],
        discount=labels.discount[rows],
        weight=labels.weight[rows],
    )


def _make_optimizer(parameters: list[nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    # The fused kernels exist for CPU and CUDA and compute the same update in one sweep.
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, fused=True)
    return torch.optim.Adam(parameters, lr=config.learning_rate, eps=config.adam_eps, fused=True)
