"""`WeightDelivery`: the online weights, on their way from a replica's stages to the rank that acts for it.

    stage 0 (rank 0) ──┐  one message a stage: its weights, flat, in the order of their names
    stage 1 (rank 1) ──┴─▶ acting rank: the whole network, for acting only

No learner rank gathers what it doesn't hold, unless it acts itself. Nothing but numbers travels: both sides know names
and shapes from the network and the partition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpdqn.learner import Learner
from mpdqn.mesh import World
from mpdqn.message import Message
from mpdqn.partition import split
from mpdqn.plan import Plan

WEIGHTS = "weights"


class WeightDelivery:
    """Weights of every replica's stages to the rank that acts for it. Building one is collective over the world.

    Args:
        world: all ranks, acting ones included.
        plan: where the stages are.
        network: a network of the same names and shapes as the learner's.
        acting: for each replica, the rank that acts for it; it may be one of the replica's own.
    """

    def __init__(self, world: World, plan: Plan, network: nn.Sequential, acting: Sequence[int]) -> None:
        self._world, self._plan, self._acting = world, plan, tuple(acting)
        self._group = world.message_group(WEIGHTS, "gloo") if world.size > 1 else None
        self._states = [_flat_order(module.state_dict()) for module in split(network, plan.partition)]
        self._leaving: list[Message] = []

    def send(self, learner: Learner) -> None:
        """Start sending the weights of this rank's stages, unless the acting rank is this one."""
        to = self._acting[learner.mesh.replica]
        self.wait()
        if to == self._world.rank:
            return
        for stage in learner.stages:
            state = stage.online.state_dict()
            for names in self._states[stage.index].values():
                flat = torch.cat([state[name].detach().reshape(-1) for name in names]).cpu()
                self._leaving.append(self._start(flat, to, sending=True))

    def receive(self, replica: int, local: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of all stages of ``replica``, by name; ``local`` are those that this rank holds itself."""
        weights = {name: t.detach().clone() for name, t in (local or {}).items()}
        incoming: list[tuple[Message, dict[str, torch.Size]]] = []
        for stage, source in enumerate(self._plan.replica(replica)):
            if source == self._world.rank:
                continue
            for dtype, names in self._states[stage].items():
                flat = torch.empty(sum(shape.numel() for shape in names.values()), dtype=dtype)
                incoming.append((self._start(flat, source, sending=False), names))
        for message, names in incoming:
            message.wait()
            parts = torch.split(message.tensor, [shape.numel() for shape in names.values()])
            weights |= {name: part.view(shape) for (name, shape), part in zip(names.items(), parts, strict=True)}
        return weights

    def wait(self) -> None:
        """Wait until everything that was sent has left."""
        for message in self._leaving:
            message.wait()
        self._leaving = []

    def _start(self, tensor: Tensor, peer: int, *, sending: bool) -> Message:
        assert self._group is not None
        start = self._world.send if sending else self._world.receive
        return start(tensor, peer, self._group, WEIGHTS)


def _flat_order(state: Mapping[str, Tensor]) -> dict[torch.dtype, dict[str, torch.Size]]:
    """Names and shapes of a stage's weights, by dtype: what one message holds, in its order."""
    order: dict[torch.dtype, dict[str, torch.Size]] = {}
    for name, tensor in state.items():
        order.setdefault(tensor.dtype, {})[name] = tensor.shape
    return order
