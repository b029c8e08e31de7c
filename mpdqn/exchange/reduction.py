"""`Reduction`: from the gradients of each rank's stages to those of the whole batch, and their norm, during the drain.

    stage's last backward ─▶ start: sum over replicas ─▶ (done?) ─▶ loss and ‖g‖² summed over all ranks ─▶ finish

Between the actions that a rank still runs, `proceed` goes on as far as it can without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.mesh import Mesh
from mpdqn.message import Message


class Reduction:
    """One update's reduction on one rank; `start` each stage, `proceed` at will, `finish` once."""

    def __init__(
        self, mesh: Mesh, parameters: Mapping[int, Sequence[nn.Parameter]], loss: Callable[[], Tensor]
    ) -> None:
        """A reduction over the layout of ``mesh``.

        Args:
            mesh: the layout.
            parameters: those of each stage of this rank; all have gradients when their stage is started.
            loss: this rank's share of the batch's loss, a scalar; asked when all stages are started.
        """
        self._mesh, self._parameters, self._loss = mesh, parameters, loss
        self._exchange = SynchronousExchange(mesh)
        self._waiting = set(parameters)
        self._totals: tuple[Tensor, Message | None] | None = None

    def start(self, stage: int) -> None:
        """The gradients of ``stage`` are whole on this rank: begin to sum them over the replicas."""
        self._exchange.start(stage, self._parameters[stage])
        self._waiting.discard(stage)

    def proceed(self) -> None:
        """Begin the sum of loss and norm if that needs no waiting; otherwise do nothing."""
        if self._totals is None and not self._waiting and self._exchange.done():
            self._exchange.finish()
            self._totals = self._start_totals()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the end.

        Returns:
            the loss and the gradient norm of the whole batch over all stages, scalars, alike on every rank.

        Raises:
            PeerLost: if a rank is gone or silent.
        """
        assert not self._waiting
        if self._totals is None:
            self._exchange.finish()
            self._totals = self._start_totals()
        totals, message = self._totals
        if message is not None:
            message.wait()
        return totals[0], totals[1].sqrt()

    def _start_totals(self) -> tuple[Tensor, Message | None]:
        loss = self._loss()
        squares = torch.zeros_like(loss)
        if self._mesh.replica == 0:  # after the exchange every replica holds the same gradients: count them once
            for parameters in self._parameters.values():
                gradients = [p.grad for p in parameters if p.grad is not None]
                squares = squares + nn.utils.get_total_norm(gradients).to(squares) ** 2
        totals = torch.stack([loss, squares])
        if len(self._mesh.plan.ranks) == 1:
            return totals, None
        return totals, self._mesh.sum_over(self._mesh.layout_group, totals, "the sum of loss and gradient norm")
