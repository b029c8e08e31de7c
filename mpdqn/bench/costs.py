"""The table of layer costs, with the stage that each layer falls into."""

from __future__ import annotations

from collections.abc import Iterable

from mpdqn.bench.tables import Table
from mpdqn.plan import Partition, Profile


def cost_table(profile: Profile, cuts: Iterable[Partition], forward_passes: int = 1) -> Table:
    """One row for each layer of ``profile``; a column of stage numbers for every cut into more than one stage.

    A note below gives the time of each stage in a step of ``forward_passes`` forward passes and one backward pass.
    """
    stages = {cut.num_stages: cut for cut in cuts if cut.num_stages > 1}
    rows = []
    for index, layer in enumerate(profile.layers):
        where = [str(next(j for j in range(p) if index in cut.layers_of(j))) for p, cut in stages.items()]
        rows.append(
            (
                layer.name,
                f"{layer.forward_ms:.2f}",
                f"{layer.backward_input_ms:.2f}",
                f"{layer.backward_weight_ms:.2f}",
                f"{layer.parameter_bytes / 2**10:,.0f}",
                f"{layer.activation_bytes / 2**20:,.2f}",
                f"{layer.boundary_bytes / 2**20:,.2f}",
                *where,
            )
        )
    total = profile.forward_ms + profile.backward_ms
    return Table(
        title=f"Layer costs of {profile.network}: batch {profile.batch_size}, {profile.device}, "
        f"{profile.threads} thread{'s' * (profile.threads > 1)}, {profile.memory_format}",
        columns=(
            "layer",
            "forward ms",
            "backward input ms",
            "backward weight ms",
            "parameters KiB",
            "activations MiB",
            "boundary MiB",
            *(f"stage (of {count})" for count in stages),
        ),
        rows=tuple(rows),
        notes=(
            f"forward {profile.forward_ms:.0f} ms + backward {profile.backward_ms:.0f} ms = {total:.0f} ms",
            *(_cut_note(profile, cut, forward_passes) for cut in stages.values()),
        ),
    )


def _cut_note(profile: Profile, cut: Partition, forward_passes: int) -> str:
    costs = [forward_passes * layer.forward_ms + layer.backward_ms for layer in profile.layers]
    times = [sum(costs[k] for k in cut.layers_of(j)) for j in range(cut.num_stages)]
    after = ", ".join(profile.layers[end - 1].name for end in cut.boundaries[1:-1])
    return (
        f"cut into {cut.num_stages} stages after {after}: {' + '.join(f'{t:.0f}' for t in times)} ms with "
        f"{forward_passes} forward and one backward pass, {max(times) / (sum(times) or 1):.2f} of it in the slowest "
        "stage"
    )
