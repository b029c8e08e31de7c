"""A learner's state by parameter name: what every cut of the same network shares.

online.2.weight   target.2.weight   adam.exp_avg.2.weight   adam.exp_avg_sq.2.weight   adam.step.2.weight
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from mpdqn.checkpoint.manifest import WrongCheckpoint
from mpdqn.learner import Learner

ONLINE, TARGET, OPTIMIZER = "online.", "target.", "adam."
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def learner_state(learner: Learner) -> dict[str, Tensor]:
    """The online and target network and the optimizer of this rank's stages, not copied."""
    return dict(_networks(learner)) | {
        f"{OPTIMIZER}{moment}.{name}": values[moment]
        for name, parameter in learner.named_parameters()
        for moment in MOMENTS
        if moment in (values := learner.optimizer.state.get(parameter, {}))
    }


def learner_targets(learner: Learner, saved: Collection[str]) -> dict[str, Tensor]:
    """Where the state of this rank's stages is to be loaded to, as far as it was ``saved``.

    Before the first update an optimizer has no state; here it is given one where the checkpoint has it.
    """
    for name, parameter in learner.named_parameters():
        if f"{OPTIMIZER}{MOMENTS[0]}.{name}" in saved:
            learner.optimizer.state[parameter] = {
                "exp_avg": torch.empty_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.empty_like(parameter, requires_grad=False),
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            }
    return learner_state(learner)


def shapes(network: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each of a network's tensors, as a manifest has them."""
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in network.items()}


def check_network(
    saved: Mapping[str, tuple[str, tuple[int, ...]]], here: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    """Raise WrongCheckpoint, with the first difference, unless the network ``saved`` is the one ``here``."""
    for name in [*saved, *here]:
        if saved.get(name) != here.get(name):
            raise WrongCheckpoint(
                f"{where} is of another network: {name} is {_told(saved.get(name))} there and {_told(here.get(name))} "
                "here; resume with the network that it was trained with"
            )


def _networks(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    for stage in learner.stages:
        for prefix, network in ((ONLINE, stage.online), (TARGET, stage.target)):
            for name, tensor in network.state_dict().items():
                yield prefix + name, tensor


def _told(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if entry is None else f"{entry[0]} {list(entry[1])}"
