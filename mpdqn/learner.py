"""`Learner`: one update of the online network, the same path for every layout, the single process included.

batch ─▶ first stage ─ T, M, D, F ─▶ last stage: target, loss, Σ w·loss / B_global
                     ◀───── B ─────
per stage: Σ gradients over replicas ─▶ clip by the global norm ─▶ optimizer ─▶ every n updates target ← online
last stage ─ TD errors ─▶ first stage ─▶ shards

With ``lookahead = 1`` a batch is announced one update before it is learned from, and a schedule that fills its gaps
runs its target passes T there. The update before the target changes leaves them out, since their values would be those
of the old target; they then run late, at the start of the next update:

    update            k − 1         k (target ← online at its end)      k + 1
    T of batch        k             –                                   k + 1, then k + 2

Noise of noisy networks is that of the update which learns from the batch, wherever and whenever a pass runs: one draw
for the online network (F and D, and what is recomputed), one for the target network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpdqn.dqn.agents import Agent
from mpdqn.dqn.batch import Batch
from mpdqn.exchange.reduction import Reduction
from mpdqn.mesh import Mesh
from mpdqn.message import Message
from mpdqn.networks import check_exactness, noisy_layers, set_noise
from mpdqn.pipeline.acceleration import Acceleration
from mpdqn.pipeline.labels import LabelExchange
from mpdqn.pipeline.runtime import Pipeline, Program, Values
from mpdqn.pipeline.stage import build_stages
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.schedule import ActionTable, action_table
from mpdqn.schedule.actions import FORWARD, RECOMPUTE, Action
from mpdqn.timeline import LATE, Timeline
from mpdqn.update import LearnerConfig, LearnStep, make_optimizer

__all__ = ["LearnStep", "Learner", "LearnerConfig", "gather_by_name"]


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
        table: ActionTable | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        """Cut ``network`` and keep the stages of this rank, which must have a part in the mesh's plan.

        Args:
            network: the whole chain, equal on every rank (keyed initialisation sees to that).
            mesh: the plan, laid over the processes of the run.
            agent: which passes and which loss.
            batch_size: transitions in the whole batch, over all replicas.
            observation_shape: C, H, W.
            config: how an update is made.
            table: the actions of a step, equal on every rank; the plan's schedule if not given.
            acceleration: how the layers are computed, the same on every rank; plainly if not given.

        Raises:
            ValueError: if the batch does not divide into d·m micro-batches, the table is not one of this plan, the
                network's output is not the agent's, or it has layers under which layouts would not compute the same.

        Warns:
            UserWarning: if the agent is noisy and the network has no noisy layer.
        """
        plan = mesh.plan
        self.config = config or LearnerConfig()
        parts = self.config.accumulation
        if batch_size % parts:
            raise ValueError(f"batch_size {batch_size} is not a multiple of accumulation {parts}; change one of them")
        plan.parallelism.check_batch(batch_size // parts)
        check_exactness(network)
        self._noisy = bool(noisy_layers(network))
        if agent.noisy and not self._noisy:
            warnings.warn(
                f"agent {agent.name!r} is noisy but the network has no NoisyLinear: nothing explores and nothing is "
                "averaged; build it with noisy=True",
                stacklevel=2,
            )
        self.mesh, self.plan, self.agent, self.batch_size = mesh, plan, agent, batch_size
        self.update = 0
        self.stopwatch = Stopwatch(mesh.rank, mesh.device)
        d, m = plan.parallelism.data, plan.parallelism.num_microbatches
        self._local_size, self._micro_size = batch_size // d, batch_size // (d * m * parts)
        self.stages = build_stages(
            network, plan.partition, mesh.stages, observation_shape, self._micro_size, mesh.device, acceleration
        )
        self._dtype, shape = self.stages[0].value_dtype, self.stages[0].value_shape
        agent.check_output(shape)
        self._labels = LabelExchange(mesh, self._local_size, self._dtype, shape[0] if agent.branching else 0)
        self.table = self._checked(table) if table is not None else self._planned_table()
        passes = {p.letter: p.network for p in agent.passes}
        self._pipeline = Pipeline(mesh, self.stages, self.table, passes, plan.recompute)
        self._filled = self._pipeline.program(self.table)
        self._plain = self._pipeline.program(self.table.without_ahead())
        self._late = self._pipeline.program(self.table.only_ahead())
        if self.table.ahead and self.config.target_period == 1:
            warnings.warn(
                f"target_period 1 changes the target at every update, so the passes {self.table.ahead} of schedule "
                f"{self.table.schedule} never run in its gaps; 1f1b does the same work",
                stacklevel=2,
            )
        self._upcoming: Batch | None = None
        self._prepared: list[Values] | None = None
        for stage in self.stages:
            if not any(p.requires_grad for _, p in stage.named_parameters()):
                layers = [name for name, _ in stage.online.named_children()]
                raise ValueError(
                    f"stage {stage.index} ({', '.join(layers)}) has 0 parameters to train; cut it elsewhere"
                )
        self._parameters = {stage.index: [p for _, p in stage.named_parameters()] for stage in self.stages}
        self.optimizer = make_optimizer(list(self.parameters()), self.config)

    def _planned_table(self) -> ActionTable:
        layout = self.plan.parallelism
        return action_table(
            layout.schedule,
            layout.pipeline,
            layout.num_microbatches,
            self.agent.letters,
            ahead=self.agent.frozen_letters if self.config.lookahead else "",
            virtual=layout.virtual,
            recompute=[j for j, kind in enumerate(self.plan.recompute) if kind == "all"],
        )

    def _checked(self, table: ActionTable) -> ActionTable:
        """``table``, if it is a step of this plan and agent."""
        layout, agent = self.plan.parallelism, self.agent
        have = table.check().num_stages, table.num_microbatches, set(table.passes + table.ahead)
        want = layout.num_stages, layout.num_microbatches, set(agent.letters)
        if have != want:
            raise ValueError(f"the table has (stages, m, passes) {have} but the plan and {agent.name} need {want}")
        rerun = {a.stage for a in table.actions if a.kind == RECOMPUTE}
        wanted = {j for j, kind in enumerate(self.plan.recompute) if kind == "all"}
        if not wanted <= rerun:
            raise ValueError(
                f"the plan recomputes all of stages {sorted(wanted)} but the table has an R only for {sorted(rerun)}; "
                "add them or plan without"
            )
        early = set(agent.frozen_letters) if self.config.lookahead else set()
        if not set(table.ahead) <= early:
            raise ValueError(
                f"the table runs {table.ahead} ahead but with lookahead {self.config.lookahead} only "
                f"{sorted(early) or 'nothing'} may; set lookahead=1 or use a table without"
            )
        left = set(agent.frozen_letters) - set(table.ahead)
        if self._noisy and table.ahead and left:
            raise ValueError(
                f"the table runs {table.ahead} ahead but not {''.join(sorted(left))}, which the same target network "
                "runs under the noise of another update; run all of them ahead, or none"
            )
        return table

    @property
    def owns_shards(self) -> bool:
        """Whether this rank holds its replica's first stage, and therefore its replay shards: it passes the batch."""
        return self.mesh.rank == self.mesh.first_rank

    @property
    def has_loss(self) -> bool:
        """Whether this rank holds its replica's last stage."""
        return self.mesh.rank == self.mesh.last_rank

    @property
    def compiled_modules(self) -> int:
        """How many of this rank's modules run as torch.compile compiled them (`Pipeline.compiled_modules`)."""
        return self._pipeline.compiled_modules

    def parameters(self) -> Iterator[nn.Parameter]:
        """The online parameters of this rank's stages."""
        for stage in self.stages:
            yield from stage.online.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The online parameters of this rank's stages, under their global names."""
        for stage in self.stages:
            yield from stage.named_parameters()

    def learn(self, batch: Batch | None, upcoming: Batch | None = None) -> LearnStep:
        """One update. Collective over the plan's ranks.

        Args:
            batch: this replica's B/d transitions, on the rank of its first stage; None on the other ranks.
            upcoming: with ``lookahead = 1``, the batch of the next update, likewise; the next call must pass the very
                same as its ``batch``.

        Raises:
            ValueError: if a batch is missing, unexpected, of the wrong size or not the one that was announced.
            PeerLost: if another rank is gone or silent.
        """
        self._check(batch, upcoming)
        self.stopwatch.restart()
        self.optimizer.zero_grad(set_to_none=True)
        refresh = (self.update + 1) % self.config.target_period == 0
        late = len(self.table.ahead) if self._prepared is None else 0
        now = None if batch is None else batch.to(self.mesh.device, self._dtype)
        labels, label_messages = self._labels.pass_labels(now)
        self._set_noise("online", self.update)
        if late:
            self._set_noise("target", self.update)
            begin = self.stopwatch.now()
            self._prepared = [
                self._pipeline.run(self._late, self._frames(self._late, now, now, part), _no_loss, self.stopwatch)
                for part in range(self.config.accumulation)
            ]
            self.stopwatch.mark(LATE, begin)
        losses: list[Tensor] = []
        errors: dict[int, Tensor] = {}
        td_errors: list[tuple[Tensor, list[Message]]] = []
        m, parts = self.plan.parallelism.num_microbatches, self.config.accumulation

        def loss_of(part: int, i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            while label_messages:
                label_messages.pop().wait()
            first = (part * m + i) * self._micro_size
            rows = labels.rows(first, first + self._micro_size)
            loss, errors[first] = self.agent.loss(q, values, rows, self.batch_size)
            losses.append(loss.detach())
            if len(errors) == m * parts:
                td_errors.append(self._labels.return_td_errors([errors[row] for row in sorted(errors)]))
            return loss

        reduction = Reduction(self.mesh, self._parameters, lambda: self._sum(losses))
        program = self._plain if refresh else self._filled
        # Passes over the next batch belong to the next update, and with them all that the target network runs now.
        self._set_noise("target", self.update + bool(program.table.ahead))
        prepared = self._prepared or []
        self._prepared = None if refresh or not self.table.ahead else []
        for part in range(parts):
            ahead = self._pipeline.run(
                program,
                self._frames(program, now, upcoming, part),
                lambda i, q, values, part=part: loss_of(part, i, q, values),  # type: ignore[misc]
                self.stopwatch,
                known=prepared[part] if prepared else None,
                after=self._progress(program, reduction) if part == parts - 1 else None,
            )
            if self._prepared is not None:
                self._prepared.append(ahead)
        begin = self.stopwatch.now()
        returned, return_messages = td_errors[0] if self.has_loss else self._labels.return_td_errors([])
        loss, grad_norm = reduction.finish()
        self.mesh.world.activity.set(f"finishing update {self.update + 1}")
        self.stopwatch.mark("exchange", begin)
        begin = self.stopwatch.now()
        self._clip(grad_norm)
        self.optimizer.step()
        self.update += 1
        self._upcoming = upcoming
        if refresh:
            for stage in self.stages:
                stage.refresh_target(self.config.target_tau)
        self.stopwatch.mark("optimizer", begin)

        for message in (*label_messages, *return_messages):
            message.wait()
        self.stopwatch.stop()
        return LearnStep(
            update=self.update,
            loss=loss,
            grad_norm=grad_norm,
            td_errors=returned if self.owns_shards else None,
            late_passes=late,
            bytes_sent=self.mesh.reset_bytes(),
        )

    def timeline(self) -> Timeline:
        """What this rank did in its last update, and when."""
        return self.stopwatch.timeline()

    def _progress(self, program: Program, reduction: Reduction) -> Callable[[Action], None]:
        """What to do after each action: begin to reduce a stage whose gradients are whole, and go on with that."""

        def after(action: Action) -> None:
            if action in program.completes:
                reduction.start(program.completes[action])
            reduction.proceed()

        return after

    def _frames(self, program: Program, batch: Batch | None, upcoming: Batch | None, part: int) -> dict[str, Tensor]:
        """The frames that each kind of pass runs over in one part of an update; empty on ranks without the batch."""
        frames = {p.letter: p.frames for p in self.agent.passes}
        whole: dict[str, Tensor] = {}
        if batch is not None:
            whole = {FORWARD: batch.obs} | {k: getattr(batch, frames[k]) for k in program.table.passes}
        if upcoming is not None:
            whole |= {k: getattr(upcoming, frames[k]) for k in program.table.ahead}
        parts = self.config.accumulation
        return {k: f.chunk(parts)[part].to(self.mesh.device, non_blocking=True) for k, f in whole.items()}

    def _set_noise(self, which: Literal["online", "target"], update: int) -> None:
        """Give this rank's noisy layers of one network the noise of ``update``."""
        if self._noisy:
            for stage in self.stages:
                set_noise(stage.online if which == "online" else stage.target, self.config.seed, update, which)

    def _check(self, batch: Batch | None, upcoming: Batch | None) -> None:
        rank = self.mesh.rank
        expected = {"batch": (batch, self.owns_shards), "upcoming": (upcoming, self.owns_shards)}
        if not self.config.lookahead:
            expected["upcoming"] = upcoming, False
        for what, (given, wanted) in expected.items():
            if (given is not None) != wanted:
                have = f"got {'a' if given is not None else 'no'} batch" + " as upcoming" * (what == "upcoming")
                both = " and the upcoming one" if self.config.lookahead else ""
                raise ValueError(
                    f"rank {rank} {have} (lookahead {self.config.lookahead}); rank {self.mesh.first_rank}, the first "
                    f"stage of its replica, passes the batch{both} and the other ranks pass None"
                )
            if given is not None and len(given) != self._local_size:
                raise ValueError(
                    f"rank {rank} got {len(given)} transitions but a replica's part of batch_size {self.batch_size} is "
                    f"{self._local_size} (d = {self.plan.parallelism.data})"
                )
        if self._upcoming is not None and batch is not self._upcoming:
            raise ValueError(
                f"update {self.update + 1} got another batch than update {self.update} had announced as upcoming; pass "
                "that one"
            )

    def _sum(self, losses: list[Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=self._dtype, device=self.mesh.device)
        return torch.stack([zero, *losses]).sum()

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


def _no_loss(i: int, q: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    raise AssertionError("passes without gradient have no loss")
