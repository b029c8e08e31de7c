import sys
from collections import OrderedDict
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import nn

from mpdqn.networks import as_chain, load_network, make_network

SHAPE = (2, 12, 10)

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, actions):
        super().__init__()
        self.fc = nn.Linear(shape[0] * shape[1] * shape[2], actions)

    def forward(self, x):
        return self.fc(x.flatten(1).to(self.fc.weight.dtype) / 255)

def my_network(shape, actions):
    return Net(shape, actions)

def number(shape, actions):
    return 3

def broken(shape, actions):
    raise KeyError("no such\\nthing")

constant = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return file


class Bytes(nn.Module):
    """Flat floats of the frames, to stand before linear layers."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.flatten(1).float()


def linear(shape: tuple[int, int, int], actions: int) -> nn.Module:
    return nn.Sequential(OrderedDict(bytes=Bytes(), fc=nn.Linear(shape[0] * shape[1] * shape[2], actions)))


def equal(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_a_zoo_name_is_made_with_its_options() -> None:
    loaded = load_network("impala", SHAPE, 3, width=0.5, fc=8, pooling="average", head="dueling", seed=4)
    made = make_network("impala", SHAPE, 3, width=0.5, fc=8, pooling="average", head="dueling", seed=4)
    assert equal(loaded, made)


def test_an_unknown_name_says_how_to_bring_a_network() -> None:
    with pytest.raises(ValueError, match=r"'natur', did you mean 'nature'\?.*path/to/file.py:function"):
        load_network("natur", SHAPE, 3)


def test_errors_of_a_zoo_network_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"36×36 pixels but got 12×10") as caught:
        load_network("nature", SHAPE, 3)
    assert "file.py" not in str(caught.value)


def test_a_function_in_a_file(path: Path) -> None:
    modules = set(sys.modules)
    network = load_network(f"{path}:my_network", SHAPE, 5, seed=1)
    assert [name for name, _ in network.named_parameters()] == ["network.fc.weight", "network.fc.bias"]
    assert network(torch.zeros(3, *SHAPE, dtype=torch.uint8)).shape == (3, 5)
    assert not {name for name in set(sys.modules) - modules if "mine" in name}
    # its class travels to a process that never ran the file
    copy = cloudpickle.loads(cloudpickle.dumps(network))
    assert equal(copy, network)


def test_two_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    for folder, width in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(
            FILE.replace("actions)\n\n    def forward", f"{width})\n\n    def forward")
        )
    for folder, width in (("a", 2), ("b", 3)):
        network = load_network(f"{tmp_path / folder / 'net.py'}:my_network", SHAPE, width)
        assert network(torch.zeros(1, *SHAPE, dtype=torch.uint8)).shape == (1, width)


def test_the_seed_decides_the_weights_of_a_users_network(path: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = load_network(f"{path}:my_network", SHAPE, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(load_network(f"{path}:my_network", SHAPE, 5, seed=1), first)
    assert not equal(load_network(f"{path}:my_network", SHAPE, 5, seed=2), first)


def test_a_callable_itself() -> None:
    network = load_network(linear, SHAPE, 4)
    assert [name for name, _ in network.named_children()] == ["bytes", "fc"]


def test_lazy_layers_are_made_real_by_the_seed() -> None:
    def lazy(shape: tuple[int, int, int], actions: int) -> nn.Module:
        return nn.Sequential(Bytes(), nn.LazyLinear(actions))

    first = load_network(lazy, SHAPE, 4, seed=1)
    assert first[1].weight.shape == (4, 240)
    torch.manual_seed(5)
    assert equal(load_network(lazy, SHAPE, 4, seed=1), first)


def test_options_of_the_zoo_warn_on_other_networks() -> None:
    with pytest.warns(UserWarning, match=r"width=2 has no effect on linear"):
        load_network(linear, SHAPE, 4, width=2)
    with pytest.warns(UserWarning, match=r"head='dueling' has no effect on linear"):
        load_network(linear, SHAPE, 4, head="dueling")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*nothing\.py"):
        load_network(f"{tmp_path}/nothing.py:net", SHAPE, 3)


@pytest.mark.parametrize("spec", ["mine.py", "some/where", "nature:18"])
def test_a_spec_without_a_file_or_function(spec: str) -> None:
    with pytest.raises(ValueError, match=r"does not name a function in a file; write path/to/file\.py:function"):
        load_network(spec, SHAPE, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"), ("def (", "SyntaxError")],
)
def test_a_file_that_does_not_import(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.py does not import: {reason}") as caught:
        load_network(f"{file}:net", SHAPE, 3)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert not [name for name in sys.modules if name.startswith("mpdqn_network_bad")]


def test_a_missing_function_offers_the_nearest(path: Path) -> None:
    with pytest.raises(ValueError, match=r"no function called 'my_netwrok', did you mean 'my_network'\?.*broken"):
        load_network(f"{path}:my_netwrok", SHAPE, 3)
    with pytest.raises(ValueError, match=r"int, not a function, called 'constant'"):
        load_network(f"{path}:constant", SHAPE, 3)


def test_a_function_that_raises(path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.py:broken called with \(\(2, 12, 10\), 3\) raised KeyError") as caught:
        load_network(f"{path}:broken", SHAPE, 3)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_returns_no_module(path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.py:number returned int; return a torch\.nn\.Module"):
        load_network(f"{path}:number", SHAPE, 3)


def test_the_wrong_output_shape_names_both() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2, 12, 10\) into torch\.float32 of shape \(2, 4\).*\(2, 3\)"):
        load_network(lambda shape, actions: linear(shape, 4), SHAPE, 3)
    with pytest.raises(ValueError, match=r"returned tuple; return a tensor \[B, 3\]"):
        load_network(lambda shape, actions: Pair(), SHAPE, 3)


def test_a_network_of_ones_own_must_have_the_agents_output() -> None:
    """What a distributional or branching agent needs is no option of a network from elsewhere: it has it or not."""

    def atoms(shape: tuple[int, int, int], actions: int) -> nn.Module:
        return nn.Sequential(*linear(shape, actions * 7), nn.Unflatten(1, (actions, 7)))

    x = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    assert load_network(atoms, SHAPE, 3, num_atoms=7)(x).shape == (2, 3, 7)
    with pytest.raises(
        ValueError, match=r"of shape \(2, 3, 7\); it must return floats of shape \(2, 3, 9\), what this"
    ):
        load_network(atoms, SHAPE, 3, num_atoms=9)
    with pytest.raises(
        ValueError, match=r"of shape \(2, 3, 7\); it must return floats of shape \(2, 3\), one value per"
    ):
        load_network(atoms, SHAPE, 3)
    with pytest.raises(ValueError, match=r"of shape \(2, 3\); it must return floats of shape \(2, 2, 3\), what this"):
        load_network(linear, SHAPE, 3, branches=2)
    with pytest.raises(ValueError, match=r"returned tuple; return a tensor \[B, 3, 9\]"):
        load_network(lambda shape, actions: Pair(), SHAPE, 3, num_atoms=9)
    with pytest.warns(UserWarning, match="noisy=True has no effect on linear"):
        load_network(linear, SHAPE, 3, noisy=True)


class Pair(nn.Module):
    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return frames, frames


def test_a_forward_that_raises_names_the_shape_and_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"network too_small cannot take frames of shape \(2, 12, 10\).*RuntimeError: mat"
    ):
        load_network(too_small, SHAPE, 3)


def too_small(shape: tuple[int, int, int], actions: int) -> nn.Module:
    return linear((1, 1, 1), actions)


def test_networks_that_are_not_exact_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer '1' is a BatchNorm1d"):
        load_network(lambda shape, actions: nn.Sequential(Bytes(), nn.BatchNorm1d(240)), SHAPE, 240)


def test_networks_away_from_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has fc\.weight on meta; build it on the CPU"):
        load_network(lambda shape, actions: linear(shape, actions).to("meta"), SHAPE, 3)


def test_the_observation_shape_is_checked_for_every_network() -> None:
    with pytest.raises(ValueError, match=r"must be \(channels, height, width\)"):
        load_network(linear, (84, 84), 3)


def test_as_chain() -> None:
    chain = nn.Sequential(nn.Identity())
    assert as_chain(chain) is chain
    layer = nn.Linear(1, 1)
    assert dict(as_chain(layer).named_children()) == {"network": layer}


def test_as_chain_of_a_subclass_can_be_sliced() -> None:
    class Stack(nn.Sequential):
        def __init__(self, depth: int) -> None:
            relu = nn.ReLU()
            super().__init__(*[nn.Linear(2, 2) if index % 2 else relu for index in range(depth)])

    chain = as_chain(Stack(4))
    assert [name for name, _ in chain[1:4].named_parameters()] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert len(chain) == 4  # the shared ReLU stands in both places

    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert [name for name, _ in as_chain(Twice(nn.Identity())).named_children()] == ["network"]
