import copy

import pytest
import torch

from mpdqn.networks import make_network
from mpdqn.networks.scale import Scale

EVERY_BYTE = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)


def test_scale_divides_by_255_in_the_networks_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scaled = Scale().to(dtype)(EVERY_BYTE)
        assert scaled.dtype is dtype
        assert torch.equal(scaled, EVERY_BYTE.to(dtype) / 255)
    assert float(scaled.min()) == 0
    assert float(scaled.max()) == 1


def test_frames_stay_as_they_are() -> None:
    frames = EVERY_BYTE.clone()
    Scale()(frames)
    assert torch.equal(frames, EVERY_BYTE)


def test_scale_adds_nothing_to_the_state_dict() -> None:
    assert Scale().state_dict() == {}
    assert list(Scale().parameters()) == []


def test_scale_follows_the_networks_memory_format() -> None:
    scale = Scale().to(memory_format=torch.channels_last)
    for frames in (EVERY_BYTE, EVERY_BYTE.to(memory_format=torch.channels_last)):
        assert scale(frames).is_contiguous(memory_format=torch.channels_last)
        assert copy.deepcopy(scale)(frames).is_contiguous(memory_format=torch.channels_last)
        assert Scale()(frames).is_contiguous()
    back = scale.to(memory_format=torch.contiguous_format)
    assert back(EVERY_BYTE).is_contiguous()


def test_scale_survives_a_meta_network_made_real() -> None:
    with torch.device("meta"):
        scale = Scale().double()
    assert torch.equal(scale.to_empty(device="cpu")(EVERY_BYTE), EVERY_BYTE.double() / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_other_frames_than_uint8_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"takes uint8 frames .* got {dtype}"):
        Scale()(EVERY_BYTE.to(dtype))


@pytest.mark.parametrize("name", ["nature", "impala", "resnet18"])
def test_a_double_network_computes_in_float64_throughout(name: str) -> None:
    network = make_network(name, (4, 40, 40), 3, fc=16)
    double = copy.deepcopy(network).double()
    x = torch.randint(0, 256, (2, 4, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for layer in double:
        x = layer(x)
        assert x.dtype is torch.float64
    frames = torch.randint(0, 256, (2, 4, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(frames).double(), double(frames), rtol=1e-4, atol=1e-5)
