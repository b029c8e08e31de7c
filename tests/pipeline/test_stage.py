"""`build_stages`: names, targets of their own, and the memory of what crosses a cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpdqn.networks import make_network, set_memory_format
from mpdqn.pipeline.stage import Stage, build_stages
from mpdqn.plan import Partition

FRAMES, CPU = (4, 44, 44), torch.device("cpu")
THIRDS = Partition(boundaries=(0, 4, 8, 11))


def network(memory_format: str = "contiguous") -> nn.Sequential:
    chain = make_network("nature", FRAMES, 5, fc=32, seed=3)
    set_memory_format(chain, memory_format)  # type: ignore[arg-type]
    return chain


def stages(chain: nn.Sequential, indices: tuple[int, ...] = (0, 1, 2)) -> list[Stage]:
    return build_stages(chain, THIRDS, indices, FRAMES, 6, CPU)


def test_parameters_are_the_networks_own_under_global_names() -> None:
    chain = network()
    built = stages(chain, (0, 2))
    assert [stage.index for stage in built] == [0, 2]
    own = dict(chain.named_parameters())
    for stage in built:
        for name, parameter in stage.named_parameters():
            assert parameter is own[name]
    layers = dict.fromkeys(name.split(".")[0] for stage in built for name, _ in stage.named_parameters())
    assert list(layers) == ["conv1", "conv2", "fc", "head"]


def test_the_target_starts_equal_and_stays_apart() -> None:
    (stage,) = stages(network(), (1,))
    x = torch.randn(6, *stage.example_input.shape[1:])
    assert torch.equal(stage.online(x), stage.target(x))
    with torch.no_grad():
        for parameter in stage.online.parameters():
            parameter += 1
    assert not torch.equal(stage.online(x), stage.target(x))
    assert not any(p.requires_grad for p in stage.target.parameters())
    addresses = [p.data_ptr() for p in stage.target.parameters()]
    stage.refresh_target()
    assert torch.equal(stage.online(x), stage.target(x))
    assert [p.data_ptr() for p in stage.target.parameters()] == addresses, "a copy, not a share"
    assert all(p.requires_grad for p in stage.online.parameters())


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_target_follows_the_online_network(tau: float) -> None:
    (stage,) = stages(network(), (1,))
    with torch.no_grad():
        for parameter in stage.online.parameters():
            parameter += 1
    before = [p.clone() for p in stage.target.parameters()]
    stage.refresh_target(tau)
    for old, online, target in zip(before, stage.online.parameters(), stage.target.parameters(), strict=True):
        torch.testing.assert_close(target, tau * online + (1 - tau) * old)
        assert not target.requires_grad


@pytest.mark.parametrize("tau", [1.0, 0.7, 0.25, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tensors_at_once_move_as_each_by_itself(tau: float, dtype: torch.dtype) -> None:
    """The names of the online network were gathered anew for each tensor of the target: quadratic in the layers."""
    (stage,) = build_stages(network().to(dtype), Partition(boundaries=(0, 11)), (0,), FRAMES, 6, CPU)
    gathered = []
    stage.online.register_state_dict_pre_hook(lambda *_: gathered.append(1))
    expected = {}
    with torch.no_grad():
        for (name, online), target in zip(stage.online.named_parameters(), stage.target.parameters(), strict=True):
            online += torch.randn_like(online)
            expected[name] = target.clone().lerp_(online, tau) if tau < 1 else online.clone()
    stage.refresh_target(tau)
    assert len(gathered) == 1
    assert all(torch.equal(target, expected[name]) for name, target in stage.target.named_parameters())


def test_buffers_are_refreshed_too() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("by", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() + self.by

    chain = nn.Sequential(Shift(), nn.Flatten(), nn.Linear(12, 2))
    (stage,) = build_stages(chain, Partition(boundaries=(0, 3)), (0,), (3, 2, 2), 1, CPU)
    chain[0].by.fill_(5)
    assert stage.target[0].by == 0
    stage.refresh_target()
    assert stage.target[0].by == 5
    chain[0].by.fill_(7)
    stage.refresh_target(0.5)
    assert stage.target[0].by == 7, "statistics are copied: their average is no statistic"


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_ends_of_a_stage_tell_what_crosses_them(memory_format: str) -> None:
    """A message is memory without strides: both sides must know beforehand how it lies."""
    chain = network(memory_format)
    built = stages(chain)
    x = torch.randint(256, (6, *FRAMES), dtype=torch.uint8)
    for stage in built:
        assert stage.example_input.device.type == "meta"
        assert (stage.example_input.shape, stage.example_input.dtype) == (x.shape, x.dtype)
        x = stage.online(x)
        assert (stage.example_output.shape, stage.example_output.dtype) == (x.shape, x.dtype)
        assert stage.example_output.stride() == x.stride()
        assert stage.example_output.requires_grad
    assert not built[0].example_input.requires_grad, "frames take no gradient"
    crossing = built[0].example_output
    last = crossing.is_contiguous(memory_format=torch.channels_last)
    assert last == (memory_format == "channels_last")


class ByDevice(nn.Module):
    """Float32 and contiguous on one device, as group_norm in CUDA's autocast; what came in on another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.device.type == "cpu" else x.float().contiguous()


@pytest.mark.parametrize("indices", [(0, 1), (0,), (1,), ()])
def test_the_ends_of_a_stage_are_those_of_its_device(indices: tuple[int, ...]) -> None:
    """They were found on the CPU before the network moved: bf16 and a ResNet on two GPUs ended with a ValueError, as
    CUDA's autocast computes group_norm in float32 and the CPU's does not. The meta device stands for the GPU here."""
    chain = nn.Sequential(
        *(Half(), nn.Conv2d(4, 8, 3).bfloat16(), ByDevice()),
        *(Half(), nn.Flatten(), nn.Linear(8 * 42 * 42, 2).bfloat16()),
    ).to(memory_format=torch.channels_last)
    before = {name: p.device for name, p in chain.named_parameters()}
    cut, meta = Partition(boundaries=(0, 3, 6)), torch.device("meta")
    built = build_stages(chain, cut, indices, FRAMES, 6, meta)
    for stage in built:
        inner = stage.example_output if stage.index == 0 else stage.example_input
        assert inner.dtype == torch.float32
        assert inner.is_contiguous()
        assert {p.device for p in (*stage.online.parameters(), *stage.target.parameters())} == {meta}
    own = {name for stage in built for name, _ in stage.named_parameters()}
    after = {name: p.device for name, p in chain.named_parameters() if name not in own}
    assert after == {name: device for name, device in before.items() if name not in own}, "other ranks' stages stay"


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16)


def test_building_looks_at_the_network_and_leaves_it() -> None:
    """Shapes come from two frames without gradient: no statistics move, no random number is drawn."""
    chain = network()
    state = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    random = torch.get_rng_state()
    stages(chain)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in chain.state_dict().items())
    assert all(p.grad is None for p in chain.parameters())


class Float(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).float()


def test_a_stage_does_not_write_into_what_it_received() -> None:
    """Only the layers before its first new memory are told so; behind, writing in place stays as it saves memory."""
    relus = [nn.ReLU(inplace=True) for _ in range(4)]
    chain = nn.Sequential(
        *(Float(), nn.Linear(12, 8), relus[0], nn.Linear(8, 8)),
        *(relus[1], nn.Identity(), relus[2], nn.Linear(8, 8), relus[3], nn.Linear(8, 2)),
    )
    build_stages(chain, Partition(boundaries=(0, 4, 10)), (0, 1), (3, 2, 2), 2, CPU)
    assert [relu.inplace for relu in relus] == [True, False, False, True]
