"""Profiles to test with."""

import random

from mpdqn.plan import LayerCost, Partition, Profile

MIB = 2**20


def layer(forward: float, backward_input: float, backward_weight: float, activations: int, boundary: int) -> LayerCost:
    return LayerCost(
        name="layer",
        forward_ms=forward,
        backward_input_ms=backward_input,
        backward_weight_ms=backward_weight,
        parameter_bytes=4,
        activation_bytes=activations,
        boundary_bytes=boundary,
    )


def profile_of(*layers: LayerCost) -> Profile:
    return Profile(network="test", batch_size=4, device="cpu", threads=1, memory_format="contiguous", layers=layers)


def any_profile(seed: int, num_stages: int, layers_each: int = 2) -> tuple[Profile, Partition]:
    """Layers of unequal times and sizes, and where the stages are cut."""
    draw = random.Random(seed)
    n = num_stages * layers_each
    layers = (
        layer(*(draw.uniform(1, 2) for _ in range(3)), draw.randint(2, 20) * MIB, draw.randint(1, 3) * MIB)
        for _ in range(n)
    )
    return profile_of(*layers), Partition(boundaries=tuple(range(0, n + 1, layers_each)))
