"""A network from a word: a name of the zoo, a function in the user's file, or the function itself.

The user's function takes ``(observation_shape, num_actions)`` and returns any `nn.Module` that maps uint8 frames
``[B, C, H, W]`` to action values ``[B, num_actions]``, or to the logits that a distributional agent needs. An
`nn.Sequential` can be cut between its layers; any other module is one layer, until it is traced.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpdqn.networks.exactness import check_exactness
from mpdqn.networks.heads import Head, output_shape
from mpdqn.networks.impala import Pooling
from mpdqn.networks.initialization import keyed_draws
from mpdqn.networks.zoo import NAMES, check_shape, make_network, nearest
from mpdqn.randomness import keyed_seed

NetworkFunction = Callable[[tuple[int, int, int], int], nn.Module]


def load_network(
    spec: str | NetworkFunction,
    observation_shape: tuple[int, int, int],
    num_actions: int,
    *,
    width: float | None = None,
    fc: int | None = None,
    pooling: Pooling | None = None,
    head: Head = "plain",
    noisy: bool = False,
    num_atoms: int = 1,
    branches: int = 0,
    seed: int = 0,
) -> nn.Sequential:
    """The network that ``spec`` names, as a chain of layers on the CPU.

    Args:
        spec: a zoo name (see `make_network`), ``path/to/file.py:function``, or the function itself. The function
            draws its weights from the stream ("initialization", ``seed``, "network").
        observation_shape: ``(C, H, W)``.
        num_actions: number of actions.
        width, fc, pooling, head, noisy: options of the zoo, see `make_network`.
        num_atoms, branches: K and D of the output, which a network from elsewhere must have by itself.
        seed: seed of the initialisation.

    Raises:
        ValueError: if there is no such network, its file or function fails, it isn't exact (`check_exactness`), its
            parameters aren't on the CPU, or it doesn't turn ``[2, C, H, W]`` frames into floats ``[2, num_actions]``
            (``[2, *output_shape]`` with atoms or branches).

    Warns:
        UserWarning: about an option of the zoo given with a network from elsewhere.
    """
    if isinstance(spec, str) and not names_code(spec):
        try:
            return make_network(
                spec,
                observation_shape,
                num_actions,
                width=width,
                fc=fc,
                pooling=pooling,
                head=head,
                noisy=noisy,
                num_atoms=num_atoms,
                branches=branches,
                seed=seed,
            )
        except ValueError as error:
            if spec in NAMES:
                raise
            raise ValueError(f"{error}; a network of your own is path/to/file.py:function") from None
    check_shape(observation_shape, num_actions)
    shape = output_shape(num_actions, num_atoms, branches)
    for option, value, default in (
        ("width", width, None),
        ("fc", fc, None),
        ("pooling", pooling, None),
        ("head", head, "plain"),
        ("noisy", noisy, False),
    ):
        if value != default:
            warnings.warn(f"{option}={value!r} has no effect on {_label(spec)}; the zoo has it", stacklevel=2)
    function = _function_of(spec) if isinstance(spec, str) else spec
    label = _label(spec)
    with keyed_draws("initialization", seed, "network"):
        try:
            module: Any = function(observation_shape, num_actions)
        except Exception as error:
            raise ValueError(
                f"{label} called with ({observation_shape}, {num_actions}) raised {_one_line(error)}"
            ) from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"{label} returned {type(module).__name__}; return a torch.nn.Module")
        check_exactness(module)
        # inside the stream, because a lazy layer draws its weights at its first forward
        _check_forward(module, label, observation_shape, shape)
    return as_chain(module)


def as_chain(module: nn.Module) -> nn.Sequential:
    """``module`` as a chain of named layers: an `nn.Sequential` is one, any other module is one layer ``network``."""
    if type(module) is nn.Sequential:
        return module
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # slicing a subclass calls its own __init__ with layers; its layers are the same in a plain one
        named = module.named_modules(remove_duplicate=False)
        return nn.Sequential(OrderedDict((name, layer) for name, layer in named if name and "." not in name))
    return nn.Sequential(OrderedDict(network=module))


def names_code(spec: str) -> bool:
    """Return whether `load_network` would run a file of the user's for ``spec``, and not build one of the zoo."""
    return spec not in NAMES and (":" in spec or "/" in spec or spec.endswith(".py"))


def _label(spec: str | NetworkFunction) -> str:
    return spec if isinstance(spec, str) else getattr(spec, "__name__", repr(spec))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _function_of(spec: str) -> NetworkFunction:
    path_text, _, name = spec.rpartition(":")
    if not path_text.endswith(".py"):
        raise ValueError(f"{spec!r} does not name a function in a file; write path/to/file.py:function")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path} (looked from {Path.cwd()})")
    # One name per file, so that two users' net.py don't meet; registered only while the file runs, so that a process
    # that never ran it gets its classes by value (cloudpickle) instead of by a name it can't import.
    module_name = f"mpdqn_network_{path.stem}_{keyed_seed(str(path.resolve())):x}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None  # a path that ends in .py has a loader
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not import: {_one_line(error)}") from error
    finally:
        sys.modules.pop(module_name, None)
    function = getattr(module, name, None)
    if not callable(function):
        names = tuple(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        what = "no function" if function is None else f"{type(function).__name__}, not a function,"
        offers = f"; it has {', '.join(names)}" if names else ""
        raise ValueError(f"{path} has {what} called {name!r}{nearest(name, names)}{offers}")
    found: NetworkFunction = function
    return found


def _check_forward(
    module: nn.Module, label: str, observation_shape: tuple[int, int, int], shape: tuple[int, ...]
) -> None:
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(f"{label} has {name} on {parameter.device}; build it on the CPU, mpdqn moves it")
    frames = torch.zeros(2, *observation_shape, dtype=torch.uint8)
    try:
        with torch.no_grad():
            values: Any = module(frames)
    except Exception as error:
        raise ValueError(
            f"network {label} cannot take frames of shape {tuple(observation_shape)} (a uint8 batch "
            f"{tuple(frames.shape)}): {_one_line(error)}"
        ) from error
    if not isinstance(values, torch.Tensor):
        wanted = ", ".join(map(str, ("B", *shape)))
        raise ValueError(f"network {label} returned {type(values).__name__}; return a tensor [{wanted}]")
    if tuple(values.shape) != (2, *shape) or not values.is_floating_point():
        meaning = "one value per action" if len(shape) == 1 else "what this agent learns (docs/agents.md)"
        raise ValueError(
            f"network {label} turned frames of shape {tuple(frames.shape)} into {values.dtype} of shape "
            f"{tuple(values.shape)}; it must return floats of shape {(2, *shape)}, {meaning}"
        )
