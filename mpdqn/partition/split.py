"""Acting on a `Partition`: a flat network becomes one `nn.Sequential` per stage."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from mpdqn.plan import Partition

if TYPE_CHECKING:
    from torch import nn


def split(model: nn.Sequential, partition: Partition) -> list[nn.Sequential]:
    """The stages of ``model``, in order; applied one after the other they compute what ``model`` computes.

    The layers are shared with ``model``, not copied, and keep their global parameter names ("2.weight",
    "conv2.weight"): the slice ``model[a:b]`` keeps them, while ``nn.Sequential(*layers)`` would count from 0 again and
    a checkpoint could not be resharded.

    Raises:
        TypeError: if ``model`` is no flat `nn.Sequential`.
        ValueError: if the partition was made for another number of layers, or two stages share a parameter.
    """
    from torch import nn

    if not isinstance(model, nn.Sequential):
        raise TypeError(f"{type(model).__name__} cannot be split; write it as a flat torch.nn.Sequential of its layers")
    if len(model) != partition.num_layers:
        raise ValueError(
            f"the network has {len(model)} layers but the partition {partition.boundaries} was made for "
            f"{partition.num_layers}; balance a profile of this network"
        )
    stages = [model[a:b] for a, b in itertools.pairwise(partition.boundaries)]
    owner: dict[nn.Parameter, tuple[int, str]] = {}
    for j, stage in enumerate(stages):
        stage.training = model.training  # the layers keep their modes; only the new container does not know its own
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            first, first_name = owner.setdefault(parameter, (j, name))
            if first != j:
                raise ValueError(
                    f"{first_name!r} of stage {first} and {name!r} of stage {j} are one parameter, which two stages "
                    "would update apart; untie them or choose boundaries that keep both in one stage"
                )
    return stages
