"""Noisy layers: the paper's formula, and noise that depends on its name alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpdqn.networks import NoisyLinear, clear_noise, initialize, make_network, noisy_layers, set_noise


def noisy_network(seed: int = 0, **options: object) -> nn.Sequential:
    return make_network("minatar", (4, 10, 10), 6, fc=8, noisy=True, seed=seed, **options)


def noise(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.cat([x.noise_in, x.noise_out]).clone() for name, x in noisy_layers(network).items()}


def frames(batch: int = 3) -> torch.Tensor:
    return torch.randint(256, (batch, 4, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_layer_is_the_papers_equation() -> None:
    layer = NoisyLinear(3, 2).double()
    epsilon_in, epsilon_out = torch.tensor([4.0, -9.0, 0.25]), torch.tensor([-1.0, 16.0])
    f_in, f_out = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([-1.0, 4.0])  # sgn(ε)·√|ε|
    torch.testing.assert_close(epsilon_in.sign() * epsilon_in.abs().sqrt(), f_in)
    torch.testing.assert_close(epsilon_out.sign() * epsilon_out.abs().sqrt(), f_out)
    with torch.no_grad():
        layer.weight_sigma.copy_(torch.arange(6).reshape(2, 3))
        layer.bias_sigma.copy_(torch.tensor([0.5, 0.25]))
    layer.set_noise(f_in, f_out)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.empty(5, 2, dtype=torch.float64)
    for i in range(5):
        for j in range(2):
            weights = [layer.weight[j, k] + layer.weight_sigma[j, k] * f_out[j] * f_in[k] for k in range(3)]
            bias = layer.bias[j] + layer.bias_sigma[j] * f_out[j]
            expected[i, j] = (sum(weights[k] * x[i, k] for k in range(3)) + bias).detach()
    torch.testing.assert_close(layer(x), expected)


def test_without_noise_it_is_the_linear_layer_of_its_means_bit_for_bit() -> None:
    layer, linear, x = NoisyLinear(30, 20), nn.Linear(30, 20), torch.randn(5, 30)
    linear.load_state_dict({name: value for name, value in layer.state_dict().items() if "sigma" not in name})
    assert torch.equal(layer(x), linear(x))


def test_initialisation_is_the_papers() -> None:
    layer = NoisyLinear(400, 300)
    for mean in (layer.weight, layer.bias):
        assert mean.abs().max() <= 1 / 20
        assert mean.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.1)
    for sigma in (layer.weight_sigma, layer.bias_sigma):
        assert bool((sigma == 0.5 / 20).all())


def test_means_start_as_those_of_the_same_network_without_noise() -> None:
    plain = make_network("minatar", (4, 10, 10), 6, fc=8, seed=3).state_dict()
    noisy = noisy_network(seed=3).state_dict()
    assert all(torch.equal(noisy[name], value) for name, value in plain.items())
    assert set(noisy) - set(plain) == {f"{layer}.{p}_sigma" for layer in ("fc", "head") for p in ("weight", "bias")}


def test_noise_is_standard_before_it_is_squashed() -> None:
    layer = NoisyLinear(50_000, 3)
    set_noise(layer, 0, 0, "online")
    epsilon = layer.noise_in.sign() * layer.noise_in**2
    assert epsilon.mean().item() == pytest.approx(0, abs=0.02)
    assert epsilon.std().item() == pytest.approx(1, abs=0.02)


def test_noise_depends_on_seed_update_network_and_layer_and_on_nothing_else() -> None:
    network = noisy_network()
    set_noise(network, 1, 2, "online")
    first = noise(network)
    assert not torch.equal(first["fc"][:8], first["head"][:8])
    for key in ((2, 2, "online"), (1, 3, "online"), (1, 2, "target")):
        set_noise(network, *key)
        assert all(not torch.equal(noise(network)[name], value) for name, value in first.items()), key
    torch.manual_seed(99)
    other = noisy_network(seed=5)
    set_noise(other[4:], 1, 2, "online")  # a stage, in another network, with another state of the generator
    assert all(torch.equal(noise(other)[name], value) for name, value in first.items())
    before = torch.random.get_rng_state()
    set_noise(other, 1, 2, "online")
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is not drawn from"


def test_noise_is_the_same_in_every_dtype() -> None:
    single, double = noisy_network(), noisy_network().double()
    for network in (single, double):
        set_noise(network, 0, 7, "online")
    assert all(torch.equal(noise(double)[name].float(), value) for name, value in noise(single).items())
    torch.testing.assert_close(double(frames()).float(), single(frames()))


class CopiesToMeta(TorchDispatchMode):
    """Keeps, for each copy from the CPU to the meta device, whether it holds the host up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and kwargs["device"].type == "meta":
            self.blocking.append(not kwargs.get("non_blocking", False))
        if func is torch.ops.aten.copy_.default and args[0].is_meta and args[1].is_cpu:
            self.blocking.append(not (args[2] if len(args) > 2 else False))
        return func(*args, **kwargs)


def test_noise_of_all_layers_travels_to_the_device_in_one_copy() -> None:
    """Two copies for each layer, of which each held the host up, made 16 an update for Rainbow."""
    network = noisy_network(head="dueling", num_atoms=5).to("meta")
    assert len(noisy_layers(network)) == 4
    with CopiesToMeta() as copies:
        set_noise(network, 0, 0, "online")
    assert copies.blocking == [False]


def test_noise_belongs_to_no_checkpoint_and_initialisation_leaves_it() -> None:
    network = noisy_network()
    assert not [name for name in network.state_dict() if "noise" in name]
    set_noise(network, 0, 0, "online")
    kept = noise(network)
    initialize(network, 4)
    network.load_state_dict(noisy_network(seed=2).state_dict())
    for copied in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(torch.equal(noise(copied)[name], value) for name, value in kept.items())


def test_cleared_noise_leaves_the_means() -> None:
    network = noisy_network()
    quiet = network(frames())
    set_noise(network, 0, 0, "online")
    assert not torch.equal(network(frames()), quiet)
    clear_noise(network)
    assert torch.equal(network(frames()), quiet)


def test_all_rows_see_one_noise_and_gradients_reach_means_and_sigmas() -> None:
    network = noisy_network(head="dueling", num_atoms=5).double()
    set_noise(network, 0, 0, "online")
    whole = network(frames(4))
    torch.testing.assert_close(torch.cat([network(part) for part in frames(4).chunk(2)]), whole)
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in network.parameters())
