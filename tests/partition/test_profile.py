"""What `profile` counts, checked by hand; its times are only checked for what must hold on any machine."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mpdqn.partition import profile
from mpdqn.plan import Profile

from .networks import small_network

FRAMES = torch.randint(0, 256, (2, 1, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def quick(model: nn.Sequential, example: Tensor = FRAMES) -> Profile:
    return profile(model, example, repeats=1, warmup=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_names_and_bytes(inplace: bool) -> None:
    layers = quick(small_network(inplace)).layers
    assert [layer.name for layer in layers] == ["scale", "conv", "relu", "flatten", "head"]
    assert [layer.parameter_bytes for layer in layers] == [0, 4 * (2 * 9 + 2), 0, 0, 4 * (18 * 3 + 3)]
    # float32, batch 2: frames 5 × 5, then 2 channels of 3 × 3 = 18, then 3 actions.
    frames, features, actions = 4 * 2 * 25, 4 * 2 * 18, 4 * 2 * 3
    assert [layer.boundary_bytes for layer in layers] == [frames, features, features, features, actions]
    # The convolution keeps its input, the ReLU its output; the head needs that too, through Flatten's view of it.
    assert [layer.activation_bytes for layer in layers] == [0, frames, features, 0, 0]


def test_activations_add_up_to_what_the_whole_network_keeps() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Sequential(nn.SiLU(), nn.Conv2d(4, 4, 3)),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    example = FRAMES.float()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        q = model(example)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    whole = sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)
    assert q.shape == (2, 2)
    assert sum(layer.activation_bytes for layer in quick(model, example).layers) == whole


def test_times_are_where_the_training_step_computes() -> None:
    times = {layer.name: layer for layer in profile(small_network(), FRAMES, repeats=3, warmup=1).layers}
    assert all(layer.forward_ms > 0 for layer in times.values())
    assert times["scale"].backward_ms == 0  # frames take no gradient and there is no parameter
    assert times["conv"].backward_input_ms == 0  # nothing before it can be trained
    assert times["conv"].backward_weight_ms > 0
    assert times["relu"].backward_weight_ms == 0
    assert times["relu"].backward_input_ms > 0
    assert times["head"].backward_input_ms > 0
    assert all(layer.backward_weight_ms >= 0 for layer in times.values())


def test_frozen_layers_have_no_backward_weight() -> None:
    model = small_network()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    layers = quick(model).layers
    assert [layer.backward_ms > 0 for layer in layers] == [False, False, False, False, True]
    assert layers[4].backward_input_ms == 0


def test_layers_that_pass_their_input_on() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4), nn.Identity(), nn.Flatten(), nn.Linear(4, 2), nn.Identity())
    layers = quick(model, FRAMES.float()).layers
    assert layers[1].backward_weight_ms > 0  # the gradient came through all four that follow
    assert layers[2].activation_bytes == 0


def test_one_layer_in_two_places_is_two_layers() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 25), relu, nn.Linear(25, 2), relu)
    assert [layer.name for layer in quick(model, FRAMES.float()).layers] == ["0", "1", "2", "3", "4"]


def test_circumstances_and_json() -> None:
    measured = profile(small_network(), FRAMES, name="small", repeats=1, warmup=0, threads=1)
    assert (measured.network, measured.batch_size, measured.device, measured.threads) == ("small", 2, "cpu", 1)
    assert Profile.from_json(measured.to_json()) == measured


def test_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3))
    example = FRAMES.float()
    assert quick(model, example).memory_format == "contiguous"
    assert quick(model.to(memory_format=torch.channels_last), example).memory_format == "channels_last"
    assert quick(nn.Sequential(nn.Flatten(), nn.Linear(25, 2)), example).memory_format == "contiguous"


def test_mixed_memory_format() -> None:
    last = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3), last)
    assert quick(model, torch.rand(1, 1, 5, 5)).memory_format == "mixed"


def test_the_model_and_torch_are_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 1).eval())
    first = model.get_parameter("0.weight")
    first.grad = torch.full_like(first, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():  # where a caller may well be
        measured = profile(model, FRAMES.float(), repeats=2, warmup=1, threads=1)
        assert not torch.is_grad_enabled()
    assert measured.backward_ms > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.grad is not None
    assert torch.equal(first.grad, torch.full_like(first, 7.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert [layer.training for layer in model] == [True, True, True, True, False]


def test_threads_are_restored_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        profile(small_network(), FRAMES[:, :, :4], threads=threads + 1)
    assert torch.get_num_threads() == threads


def test_not_a_flat_network() -> None:
    with pytest.raises(
        TypeError, match=r"Linear cannot be profiled by layer; write it as a flat torch\.nn\.Sequential"
    ):
        profile(nn.Linear(2, 2), FRAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "value", "least"), [("repeats", 0, 1), ("warmup", -1, 0), ("threads", 0, 1)])
def test_counts_out_of_range(count: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} is {value} but must be at least {least}"):
        profile(small_network(), FRAMES, **{count: value})  # type: ignore[arg-type]


def test_an_empty_batch() -> None:
    with pytest.raises(ValueError, match=r"shape \[0, 1, 5, 5\]; give a batch of at least 1"):
        quick(small_network(), FRAMES[:0])


def test_an_example_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"the example is on meta but 'conv\.weight' on cpu"):
        quick(small_network(), FRAMES.to("meta"))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_a_layer_that_returns_two_tensors() -> None:
    with pytest.raises(TypeError, match=r"layer 1 \('1'\) returns tuple"):
        quick(nn.Sequential(nn.Flatten(), Twice()))


def test_a_layer_in_place_on_a_view() -> None:
    """Its gradient takes another way through the graph: the layers before it would seem to cost nothing."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(18, 1))
    with pytest.raises(ValueError, match=r"no gradient passes from layer 2 \('2'\) to its input.*use inplace=False"):
        quick(model, FRAMES.float())
