"""What a stage keeps for its backward pass: wrappers of its layers that change memory, never a value."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A stage that keeps what crosses its layers' boundaries, and computes what lies inside a layer again.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", with a segment for each layer.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        for part in layers.modules():  # a layer that writes into its input would spoil what is kept of the one before
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """[b, …] to [b, …], as ``layers`` do."""
        for layer in self.layers:
            # No layer of an exact network draws random numbers, so there is no state to keep.
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return x


class CloneViewOutput(nn.Module):
    """A stage whose output is no view: torch's split backward detaches it in place, which a view does not allow."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """[b, …] to [b, …], as ``stage`` does."""
        output: Tensor = self.stage(x)
        return output.clone() if output._is_view() else output
