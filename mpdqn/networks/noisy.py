"""Noisy linear layers (Fortunato et al. 2018, "Noisy Networks for Exploration") whose noise has a name.

    y = (μ_w + σ_w ⊙ f(ε_out)·f(ε_in)ᵀ) x + μ_b + σ_b ⊙ f(ε_out),    f(ε) = sgn(ε)·√|ε|          factorised, equation 11

Noise that a layer drew as it ran would depend on the order of execution: micro-batches, replicas, stages and recomputed
forwards would each see another. Here it is *set*, from the stream ("noise", seed, update, which network, layer name),
and stays until it is set again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpdqn.randomness import keyed_seed

SIGMA0 = 0.5


class NoisyLinear(nn.Linear):
    """A linear layer with factorised Gaussian noise: floats ``[B, in_features]`` to ``[B, out_features]``.

    ``weight`` and ``bias`` are the means μ, initialised as those of `nn.Linear` (which is the paper's initialisation);
    ``weight_sigma`` and ``bias_sigma`` start at ``sigma0``/√in_features. The noise is zero until `set_noise`: the layer
    then is the linear layer of its means. Noise belongs to no checkpoint, because its name brings it back.
    """

    noise_in: Tensor
    noise_out: Tensor

    def __init__(self, in_features: int, out_features: int, *, sigma0: float = SIGMA0) -> None:
        super().__init__(in_features, out_features)
        self.sigma0 = sigma0
        self.weight_sigma = nn.Parameter(torch.empty_like(self.weight))
        self.bias_sigma = nn.Parameter(torch.empty_like(self.bias))
        self.register_buffer("noise_in", torch.zeros(in_features), persistent=False)
        self.register_buffer("noise_out", torch.zeros(out_features), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the means anew and reset σ; the noise stays as it is."""
        super().reset_parameters()
        if hasattr(self, "bias_sigma"):  # nn.Linear resets itself before there is a σ
            sigma = self.sigma0 / self.in_features**0.5
            nn.init.constant_(self.weight_sigma, sigma)
            nn.init.constant_(self.bias_sigma, sigma)

    def set_noise(self, noise_in: Tensor, noise_out: Tensor) -> None:
        """Set f(ε_in) [in_features] and f(ε_out) [out_features], of any dtype and device."""
        self.noise_in.copy_(noise_in)
        self.noise_out.copy_(noise_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, out_features] of [B, in_features], under the noise that is set."""
        weight = self.weight + self.weight_sigma * torch.outer(self.noise_out, self.noise_in)
        return F.linear(x, weight, self.bias + self.bias_sigma * self.noise_out)


def noisy_layers(network: nn.Module) -> dict[str, NoisyLinear]:
    """The noisy layers of ``network``, or of one of its stages, by global name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, NoisyLinear)}


@torch.no_grad()
def set_noise(network: nn.Module, seed: int, update: int, which: str) -> None:
    """Give every noisy layer of ``network`` (or of a stage) the noise of one update.

    Drawn on the CPU in float32, the numbers are the same on every device, in every dtype and for every cut.

    Args:
        network: modules under their global names.
        seed: the run's seed.
        update: whose noise; any number that names a draw.
        which: what the network is used as, such as ``online``, ``target`` or ``acting``.
    """
    layers = noisy_layers(network)
    if not layers:
        return
    draws = []
    for name, layer in layers.items():
        draw = torch.Generator().manual_seed(keyed_seed("noise", seed, update, which, name))
        epsilon = torch.randn(layer.in_features + layer.out_features, generator=draw)
        draws.append(epsilon.sign() * epsilon.abs().sqrt())
    device = next(iter(layers.values())).noise_in.device
    # One copy to the device for all layers. From pinned memory it does not hold the host up; torch's allocator does not
    # give that memory out again before the copy has left it.
    pinned = torch.empty(sum(map(len, draws)), pin_memory=device.type == "cuda")
    scaled = torch.cat(draws, out=pinned).to(device, non_blocking=True)
    noise = [part for layer in layers.values() for part in (layer.noise_in, layer.noise_out)]
    torch._foreach_copy_(noise, torch.split(scaled, [len(part) for part in noise]))


@torch.no_grad()
def clear_noise(network: nn.Module) -> None:
    """Set all noise of ``network`` to zero, as for an evaluation of the means."""
    for layer in noisy_layers(network).values():
        layer.noise_in.zero_()
        layer.noise_out.zero_()
