"""`Compiled`: layers that run through torch.compile, and whether they really did."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Compiled(nn.Module):
    """Layers compiled by ``torch.compile`` for static shapes, on the first call for each shape and grad mode.

    Dynamo keeps what it compiled by code object, at most ``recompile_limit`` (8) entries for each, and runs everything
    beyond that uncompiled after one log line. All modules that are passed to ``torch.compile`` directly share one code
    object; here each gets a code object of its own, so that their number has no limit.
    """

    def __init__(self, layers: nn.Module, name: str = "layers", backend: str = "inductor") -> None:
        """Compile ``layers`` with ``backend``; logs and profiles of torch.compile show ``name``, an identifier."""
        super().__init__()
        self.layers = layers
        self._seen = seen = _Seen()  # the closures hold this, not `self`, which would be a cycle of references
        compile_graph = torch._dynamo.lookup_backend(backend)

        def count(graph: Any, inputs: Any) -> Any:
            seen.graphs += 1
            return compile_graph(graph, inputs)

        self._run = torch.compile(_own_code(layers, seen, name), dynamic=False, backend=count)

    @property
    def is_compiled(self) -> bool:
        """Whether dynamo compiled the layers and every call so far ran what it compiled."""
        return self._seen.graphs > 0 and not self._seen.ran_uncompiled

    def forward(self, x: Tensor) -> Tensor:
        """[b, …] to [b, …], as ``layers`` do."""
        output: Tensor = self._run(x)
        return output


class _Seen:
    """What became of a `Compiled`: how many graphs the backend got, and whether Python ever ran the layers."""

    graphs = 0
    ran_uncompiled = False


def _own_code(layers: nn.Module, seen: _Seen, name: str) -> Callable[[Tensor], Any]:
    """A function that calls ``layers``, with a code object that no other function has."""

    def run(x: Tensor) -> Any:
        if not torch.compiler.is_compiling():  # constant while dynamo traces: only the interpreter gets here
            seen.ran_uncompiled = True
        return layers(x)

    code = run.__code__.replace(co_name=name)
    return types.FunctionType(code, run.__globals__, name, run.__defaults__, run.__closure__)
