import itertools
import re

import pytest
import torch
from torch import nn

from mpdqn.networks import NAMES, count_macs, make_network
from mpdqn.networks.resnet import resnet

ATARI = (4, 84, 84)
SMALL = {
    "nature": (2, 40, 36),
    "impala": (2, 16, 11),
    "minatar": (4, 10, 10),
    "resnet18": (2, 33, 20),
    "resnet50": (2, 33, 20),
}


def frames(shape: tuple[int, ...], batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=generator)


def test_the_zoo_lists_its_networks() -> None:
    assert NAMES == ("nature", "impala", "minatar", "resnet18", "resnet34", "resnet50", "resnet101")


@pytest.mark.parametrize("head", ["plain", "dueling"])
@pytest.mark.parametrize("name", SMALL)
def test_networks_are_flat_chains_of_named_layers(name: str, head: str) -> None:
    network = make_network(name, SMALL[name], 5, fc=16, head=head)
    assert type(network) is nn.Sequential
    for layer_name, layer in network.named_children():
        assert "." not in layer_name
        assert not isinstance(layer, nn.Sequential)
    values = network(frames(SMALL[name]))
    assert values.shape == (2, 5)
    assert values.dtype is torch.float32
    assert bool(values.isfinite().all())


def test_names_read_as_in_the_papers() -> None:
    assert list(dict(make_network("nature", ATARI, 3).named_children())) == (
        ["scale", "conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "flatten", "fc", "fc_relu", "head"]
    )
    impala = [name for name, _ in make_network("impala", ATARI, 3).named_parameters()]
    assert "section2_block1.conv1.weight" in impala
    assert impala[0] == "section1_conv.weight"
    with torch.device("meta"):
        resnet = dict(make_network("resnet50", ATARI, 3).named_parameters())
    assert {"stem_conv.weight", "stage3_block6.norm2.bias", "stage2_block1.shortcut.conv.weight"} <= set(resnet)


@pytest.mark.parametrize("name", SMALL)
def test_slices_keep_global_names_and_compose_exactly(name: str) -> None:
    network = make_network(name, SMALL[name], 5, fc=16)
    whole = network(frames(SMALL[name]))
    for cut in range(1, len(network)):
        first, second = network[:cut], network[cut:]
        assert {**first.state_dict(), **second.state_dict()}.keys() == network.state_dict().keys()
        assert torch.equal(second(first(frames(SMALL[name]))), whole)


@pytest.mark.parametrize("head", ["plain", "dueling"])
@pytest.mark.parametrize("name", SMALL)
def test_every_layer_as_its_own_stage_gives_the_same_gradients(name: str, head: str) -> None:
    # a stage receives a leaf that requires grad: a layer that wrote into its input would raise here
    network = make_network(name, SMALL[name], 5, fc=16, head=head).double()
    network(frames(SMALL[name])).square().sum().backward()
    expected = {key: parameter.grad for key, parameter in network.named_parameters()}
    network.zero_grad()
    received, sent = [], []
    x = frames(SMALL[name])
    for layer in network:
        received.append(x)
        sent.append(layer(x))
        x = sent[-1].detach().requires_grad_()
    copies = [x.detach().clone() for x in sent]
    x.square().sum().backward()
    gradient = x.grad
    for y, x in zip(reversed(sent[1:]), reversed(received[1:]), strict=True):
        y.backward(gradient)
        gradient = x.grad
    assert all(torch.equal(a, b) for a, b in zip(copies, sent, strict=True))
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-12, atol=1e-12)


def test_a_cut_can_fall_inside_a_section_and_a_stage() -> None:
    with torch.device("meta"):
        for name, width in (("impala", 4.0), ("resnet18", None)):
            network = make_network(name, ATARI, 18, width=width)
            total = count_macs(network, ATARI)
            upto = [count_macs(network[:index], ATARI) for index in range(1, len(network) + 1)]
            assert max(after - before for before, after in itertools.pairwise(upto)) < 0.17 * total


@pytest.mark.parametrize("name", SMALL)
def test_the_state_dict_loads_into_plain_torch(name: str) -> None:
    state = make_network(name, SMALL[name], 5, fc=16, seed=1).state_dict()
    other = make_network(name, SMALL[name], 5, fc=16, seed=2)
    assert other.load_state_dict(state, strict=True)
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())


def test_nature_is_the_plain_torch_network_of_the_same_names() -> None:
    network = make_network("nature", ATARI, 6)
    layers = [(key, layer) for key, layer in network.named_children() if key != "scale"]
    assert {type(layer) for _, layer in layers} == {nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear}
    plain = nn.Sequential()
    for key, layer in layers:
        fresh = {
            nn.Conv2d: lambda m: nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride),
            nn.Linear: lambda m: nn.Linear(m.in_features, m.out_features),
        }.get(type(layer), lambda m: type(m)())(layer)
        plain.add_module(key, fresh)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(frames(ATARI).float() / 255), network(frames(ATARI)))


@pytest.mark.parametrize("shape", [(3, 64, 96), (1, 84, 84), (12, 36, 41), (4, 100, 36)])
@pytest.mark.parametrize("name", ["nature", "impala", "minatar", "resnet18", "resnet50"])
def test_any_frame_size_channels_and_actions(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        for actions in (1, 7):
            network = make_network(name, shape, actions)
            assert network(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, actions)


@pytest.mark.parametrize("name", ["impala", "resnet18"])
def test_padded_networks_take_a_single_pixel(name: str) -> None:
    assert make_network(name, (1, 1, 1), 2, fc=8)(frames((1, 1, 1))).shape == (2, 2)


def test_width_fc_and_pooling_of_impala() -> None:
    network = make_network("impala", (3, 64, 96), 7, width=0.25, fc=32, pooling="average")
    channels = [network.get_submodule(f"section{i}_conv").weight.shape[0] for i in (1, 2, 3)]
    assert channels == [4, 8, 8]
    assert network.get_submodule("fc").weight.shape == (32, 8)
    assert network(frames((3, 64, 96))).shape == (2, 7)
    assert make_network("impala", (1, 8, 8), 2, width=0.01).get_submodule("section1_conv").weight.shape[0] == 1


def test_an_unknown_name_offers_the_nearest_and_lists_all() -> None:
    with pytest.raises(
        ValueError, match=r"'resnet19'.*did you mean 'resnet1.*nature, impala, minatar, resnet18.*resnet101"
    ):
        make_network("resnet19", ATARI, 3)
    with pytest.raises(ValueError, match="did you mean 'impala'"):
        make_network("Impalla", ATARI, 3)
    with pytest.raises(ValueError, match=r"^no network is called '§'; the zoo has nature"):
        make_network("§", ATARI, 3)


def test_options_without_effect_warn() -> None:
    with pytest.warns(UserWarning, match=r"width=2 has no effect on nature"):
        make_network("nature", ATARI, 3, width=2)
    with pytest.warns(UserWarning, match=r"pooling='average' has no effect on nature"):
        make_network("nature", ATARI, 3, pooling="average")
    with torch.device("meta"), pytest.warns(UserWarning, match=r"pooling='flatten' has no effect on resnet18"):
        make_network("resnet18", ATARI, 3, pooling="flatten")
    make_network("nature", ATARI, 3, pooling="flatten")  # what it does anyway: no warning


@pytest.mark.parametrize(
    ("name", "shape", "actions", "options", "message"),
    [
        ("nature", (4, 20, 20), 3, {}, "Nature needs frames of at least 36×36 pixels but got 20×20; resize"),
        ("nature", (84, 84, 4), 3, {}, "36×36 pixels but got 84×4; .* is (channels, height, width)"),
        ("minatar", (10, 10, 2), 3, {}, "minatar needs frames of at least 3×3 pixels but got 10×2; check that"),
        ("nature", ATARI, 3, {"num_atoms": 0}, "num_atoms is 0 but must be at least 1"),
        ("nature", ATARI, 3, {"branches": -1}, "branches is -1 but must be at least 0"),
        ("impala", (4, 84), 3, {}, "is (4, 84) but must be (channels, height, width)"),
        ("impala", (0, 84, 84), 3, {}, "is (0, 84, 84) but must be"),
        ("impala", ATARI, 0, {}, "num_actions is 0 but must be at least 1"),
        ("impala", ATARI, 3, {"width": 0}, "width is 0 but must be a positive number"),
        ("impala", ATARI, 3, {"width": float("nan")}, "width is nan but"),
        ("impala", ATARI, 3, {"fc": 0}, "fc is 0 but"),
        ("impala", ATARI, 3, {"pooling": "max"}, "no pooling is called 'max'; choose one of flatten, average"),
        ("nature", ATARI, 3, {"pooling": "max"}, "no pooling is called 'max'; choose one of flatten, average"),
        ("nature", ATARI, 3, {"head": "duel"}, "no head is called 'duel'; choose one of plain, dueling"),
    ],
)
def test_errors_name_both_numbers_and_the_next_step(
    name: str, shape: tuple[int, int, int], actions: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        make_network(name, shape, actions, **options)


def test_resnet_depths() -> None:
    with pytest.raises(ValueError, match="no ResNet has depth 20; choose one of 18, 34, 50, 101"):
        resnet(ATARI, 3, depth=20)
