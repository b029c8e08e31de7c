"""What a partition costs by its profile: the seconds and bytes of each stage on one micro-batch.

    recomputation   kept from forward to backward      B        I        W        R        f b i w: forward, backward,
    none            its input, its activations         b        i        w        –        backward for the input and
    boundaries      its input, its layers' outputs     f + b    f + i    f + w    –        for the weights, summed over
    all             its input                          b        i        w        f        the stage's layers; b = i + w

The first stage hands its gradient to nobody: its I does nothing, and its W is the whole backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpdqn.plan import RECOMPUTATION, LayerCost, Partition, Profile
from mpdqn.schedule.actions import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, RECOMPUTE
from mpdqn.schedule.times import ActionTimes

NONE, BOUNDARIES, ALL = RECOMPUTATION


def action_times(profile: Profile, partition: Partition, letters: str, recompute: Sequence[str] = ()) -> ActionTimes:
    """Seconds of every action on one micro-batch, by stage.

    Args:
        profile: the layers, measured on one micro-batch.
        partition: the stages.
        letters: the no-gradient passes; each costs a forward.
        recompute: one of `RECOMPUTATION` for each stage; none of them recomputes if not given.

    Raises:
        ValueError: if profile, partition and recomputation do not fit together.
    """
    seconds: dict[str, list[float]] = {
        kind: [] for kind in (FORWARD, RECOMPUTE, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, *letters)
    }
    for stage, (layers, mode) in enumerate(_stages(profile, partition, recompute)):
        forward = sum(layer.forward_ms for layer in layers) / 1e3
        whole = sum(layer.backward_ms for layer in layers) / 1e3
        for_input = sum(layer.backward_input_ms for layer in layers) / 1e3
        # Checkpoints drop the graph of a layer at the end of each part of the backward, so that each builds it again.
        again = forward if mode == BOUNDARIES else 0.0
        for kind in (FORWARD, RECOMPUTE, *letters):
            seconds[kind].append(forward)
        if mode == ALL and stage == partition.num_stages - 1:
            seconds[FORWARD][-1] = 0.0  # nobody waits for its output, so it runs once, as R
        seconds[BACKWARD].append(again + whole)
        seconds[BACKWARD_INPUT].append(again + for_input if stage else 0.0)
        seconds[BACKWARD_WEIGHT].append(again + (whole - for_input if stage else whole))
    return ActionTimes(seconds={kind: tuple(by_stage) for kind, by_stage in seconds.items()})


def activation_bytes(
    profile: Profile, partition: Partition, recompute: Sequence[str] = ()
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What each stage keeps of a micro-batch until its backward, and what that backward builds again, in bytes.

    The input of the first stage is the batch itself and counts as nothing. With ``boundaries`` one layer at a time is
    built again, so that the largest counts. Arguments and errors as in `action_times`; the result is what
    `peak_activations` takes.
    """
    kept, rebuilt = [], []
    for stage, (layers, mode) in enumerate(_stages(profile, partition, recompute)):
        received = profile.layers[partition.boundaries[stage] - 1].boundary_bytes if stage else 0
        inside = [layer.activation_bytes for layer in layers]
        outputs = sum(layer.boundary_bytes for layer in layers[:-1])
        kept.append(float(received + {NONE: sum(inside), BOUNDARIES: outputs, ALL: 0}[mode]))
        rebuilt.append(float({NONE: 0, BOUNDARIES: max(inside), ALL: sum(inside)}[mode]))
    return tuple(kept), tuple(rebuilt)


def message_bytes(profile: Profile, partition: Partition) -> tuple[float, ...]:
    """Bytes of one micro-batch across each cut, stage j to j + 1; ValueError if the two do not fit together."""
    stages = _stages(profile, partition, ())
    return tuple(float(layers[-1].boundary_bytes) for layers, _ in stages[:-1])


def stages_run_again(recompute: Sequence[str]) -> tuple[int, ...]:
    """The stages whose forward is an action of its own before each backward (R): those that recompute ``all``."""
    return tuple(stage for stage, mode in enumerate(recompute) if mode == ALL)


def _stages(
    profile: Profile, partition: Partition, recompute: Sequence[str]
) -> list[tuple[tuple[LayerCost, ...], str]]:
    """The layers and the recomputation of each stage, checked."""
    if len(profile.layers) != partition.num_layers:
        raise ValueError(
            f"the profile of {profile.network} has {len(profile.layers)} layers but the partition cuts "
            f"{partition.num_layers}; profile the network that is cut"
        )
    modes = tuple(recompute) or (NONE,) * partition.num_stages
    if len(modes) != partition.num_stages or not set(modes) <= set(RECOMPUTATION):
        raise ValueError(
            f"recompute {modes} must name one of {', '.join(RECOMPUTATION)} for each of {partition.num_stages} stages"
        )
    layers = [tuple(profile.layers[k] for k in partition.layers_of(j)) for j in range(partition.num_stages)]
    return list(zip(layers, modes, strict=True))
