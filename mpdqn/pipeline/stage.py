"""`Stage`: one stage's layers of the online and of the target network."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mpdqn.partition.split import split
from mpdqn.pipeline.acceleration import Acceleration
from mpdqn.plan import Partition


@dataclass(kw_only=True)
class Stage:
    """Stage ``index``: the same layers of the online and the target network, with global parameter names.

    ``example_input`` and ``example_output`` are meta tensors of one micro-batch, with the shape, dtype and strides that
    every micro-batch has at this stage's two ends. ``value_dtype`` and ``value_shape`` (of one row) are those of the
    whole network's output, known to every rank, whatever its own layers compute.
    """

    index: int
    online: nn.Sequential
    target: nn.Sequential
    example_input: Tensor
    example_output: Tensor
    value_dtype: torch.dtype
    value_shape: tuple[int, ...]
    is_last: bool = False
    acceleration: Acceleration = field(default_factory=Acceleration)

    def computing(self, layers: nn.Module, name: str = "layers") -> nn.Module:
        """Return a module that computes ``layers``, such as this stage's online network, with its `acceleration`.

        It shares their parameters. ``name`` is an identifier for the compiler's logs.
        """
        device = next((p.device for p in layers.parameters()), torch.device("cpu"))
        return self.acceleration.apply(layers, device, self.value_dtype if self.is_last else None, name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The online parameters, under their global names."""
        return self.online.named_parameters()

    @torch.no_grad()
    def refresh_target(self, tau: float = 1.0) -> None:
        """Target ← τ·online + (1 − τ)·target, inside the stage: nothing crosses the network.

        τ = 1 copies (Mnih et al. 2015), a smaller one follows slowly (Lillicrap et al. 2016). Buffers are copied.
        """
        trained = {name for name, _ in self.online.named_parameters()} if tau < 1.0 else set()
        online, target = self.online.state_dict(), self.target.state_dict()
        moving, copied = [n for n in target if n in trained], [n for n in target if n not in trained]
        if moving:
            torch._foreach_lerp_([target[n] for n in moving], [online[n] for n in moving], tau)
        if copied:
            torch._foreach_copy_([target[n] for n in copied], [online[n] for n in copied])


def build_stages(
    network: nn.Sequential,
    partition: Partition,
    indices: tuple[int, ...],
    frames: tuple[int, int, int],
    microbatch_size: int,
    device: torch.device,
    acceleration: Acceleration | None = None,
) -> list[Stage]:
    """The stages ``indices`` of ``network`` on ``device``, each with a target network that starts as a copy.

    Args:
        network: the whole chain, input uint8 [B, C, H, W], output [B, A] or what its agent
            learns; its parameters become the online ones.
        partition: where it is cut.
        indices: which stages are wanted here.
        frames: C, H, W of an observation.
        microbatch_size: rows of each micro-batch.
        device: where the stages live.
        acceleration: how their layers are computed; plainly if None.
    """
    acceleration = acceleration or Acceleration()
    modules = split(network, partition)
    for module in modules[1:]:
        _keep_input(module)
    for index in indices:
        modules[index].to(device)
    ends = _boundaries(modules, frames, microbatch_size, device, acceleration)
    stages = []
    for index in indices:
        online = modules[index]
        target = copy.deepcopy(online).requires_grad_(False)
        stages.append(
            Stage(
                index=index,
                online=online,
                target=target,
                example_input=ends[index],
                example_output=ends[index + 1],
                value_dtype=ends[-1].dtype,
                value_shape=tuple(ends[-1].shape[1:]),
                is_last=index == len(modules) - 1,
                acceleration=acceleration,
            )
        )
    return stages


def _keep_input(module: nn.Sequential) -> None:
    """Have a stage leave its input as it came: autograd allows no write into what was received, nor into a view of it.

    What a layer with parameters returns is new memory; a ReLU(inplace=True) may go on writing there.
    """
    for layer in module:
        for part in layer.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]
        if next(layer.parameters(), None) is not None:
            return


@torch.no_grad()
def _boundaries(
    modules: list[nn.Sequential],
    frames: tuple[int, int, int],
    microbatch_size: int,
    device: torch.device,
    acceleration: Acceleration,
) -> list[Tensor]:
    """Meta tensors of one micro-batch at the input and after each stage, seen by sending two real frames through.

    They run on ``device``, as the stages will: dtypes and strides differ between devices. CUDA's autocast computes
    group_norm in float32 and its kernel returns contiguous memory; the CPU's does neither.
    """
    x = torch.zeros((2, *frames), dtype=torch.uint8, device=device)
    ends = [torch.empty((microbatch_size, *frames), dtype=torch.uint8, device="meta")]
    plain = replace(acceleration, compiled=False)
    dtype = next((p.dtype for module in modules for p in module.parameters()), torch.float32)
    for module in modules:
        x = plain.apply(_on_device(module, device), device, dtype if module is modules[-1] else None)(x)
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        end = torch.empty((microbatch_size, *x.shape[1:]), dtype=x.dtype, device="meta", memory_format=layout)
        ends.append(end.requires_grad_())
    return ends


def _on_device(module: nn.Sequential, device: torch.device) -> nn.Sequential:
    """``module`` where it is on ``device``, otherwise a copy there: the stages of other ranks stay where they are."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return module if all(t.device == device for t in tensors) else copy.deepcopy(module).to(device)
