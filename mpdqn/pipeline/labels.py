"""What travels beside the pipeline: labels from the first to the last stage, TD errors the other way.

rank of the first stage ── action; reward, discount, weight ─▶ rank of the last stage
                       ◀────────────── TD errors ─────────────
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpdqn.dqn.agents import Labels
from mpdqn.dqn.batch import Batch
from mpdqn.mesh import LABELS, TD_ERRORS, Mesh
from mpdqn.message import Message


class LabelExchange:
    """The labels and TD errors of one replica's part of a batch; where one rank has both ends, nothing is sent.

    Args:
        mesh: who this rank is.
        size: rows of the replica's part of a batch.
        dtype: of rewards, discounts, weights and TD errors, the same on every rank.
        action_dims: D, the dimensions of an action; 0 for actions [b].
    """

    def __init__(self, mesh: Mesh, size: int, dtype: torch.dtype, action_dims: int = 0) -> None:
        self._mesh, self._size, self._dtype = mesh, size, dtype
        self._action_shape = (size, action_dims) if action_dims else (size,)
        self._at_first, self._at_last = mesh.rank == mesh.first_rank, mesh.rank == mesh.last_rank

    def pass_labels(self, batch: Batch | None) -> tuple[Labels, list[Message]]:
        """Labels on their way from the first to the last stage: the actions, and three rows of numbers.

        Raises:
            ValueError: if the batch's actions have other dimensions than the network.
        """
        device = self._mesh.device
        messages: list[Message] = []
        if batch is not None:
            action, numbers = self._actions(batch), torch.stack([batch.reward, batch.discount, batch.weight])
        else:
            action = torch.empty(self._action_shape, dtype=torch.int64, device=device)
            numbers = torch.empty((3, self._size), dtype=self._dtype, device=device)
        if self._at_first and not self._at_last:
            messages += [self._mesh.send(t, self._mesh.last_rank, LABELS) for t in (action, numbers)]
        elif self._at_last and not self._at_first:
            messages += [self._mesh.receive(t, self._mesh.first_rank, LABELS) for t in (action, numbers)]
        reward, discount, weight = numbers
        return Labels(action=action, reward=reward, discount=discount, weight=weight), messages

    def return_td_errors(self, parts: list[Tensor]) -> tuple[Tensor, list[Message]]:
        """TD errors [b] on their way from the last to the first stage; ``parts`` of them in order, at the last."""
        if self._at_last:
            errors = torch.cat(parts)
            if not self._at_first:
                return errors, [self._mesh.send(errors, self._mesh.first_rank, TD_ERRORS)]
            return errors, []
        errors = torch.empty(self._size, dtype=self._dtype, device=self._mesh.device)
        if self._at_first:
            return errors, [self._mesh.receive(errors, self._mesh.last_rank, TD_ERRORS)]
        return errors, []

    def _actions(self, batch: Batch) -> Tensor:
        action = batch.action
        if action.dim() == 1 and self._action_shape == (len(action), 1):
            action = action.unsqueeze(1)  # an environment with one action dimension need not say so
        if action.shape != self._action_shape:
            raise ValueError(
                f"the batch's actions are {list(action.shape)} but the network's output is for actions of shape "
                f"{list(self._action_shape)}; give a branching agent a network with one branch for each dimension"
            )
        return action
