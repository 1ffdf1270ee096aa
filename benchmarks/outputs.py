"""The outputs of a model's layers without the model: what observing them costs, where a step hides it in its noise.

Each chosen layer is replaced by a stand-in of its class that returns what the layer returned in one step, and a step is
the calls of all of them, in their order. So the bare step costs nearly nothing, and what remains is the observing.
Outputs have the strides that the model gave them, but the model's own work no longer brings them into the caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from models import Bench
from peers import tensor_of
from torch import Tensor, nn

from noesis.layers import select


class Outputs(nn.Module):
    """The stand-ins under the names of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Module, str]] = []  # where a layer is, as peers may put another in its place

    def forward(self, x: Tensor) -> None:
        """One step."""
        for parent, name in self.calls:
            parent._modules[name](x)  # type: ignore[misc]


def of(bench: Bench, layers: str) -> Bench:
    """The benchmark of a model's layers alone."""
    chosen = dict(select(bench.module, bench.layers[layers]))
    seen: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            x = tensor_of(output)
            if x is not None:
                seen.append((name, x.detach().clone()))  # a layer after it may work in place

        return hook

    run = bench.step(bench.module)  # which may fill a cache first
    handles = [layer.register_forward_hook(keep(name)) for name, layer in chosen.items()]
    run()
    for handle in handles:
        handle.remove()
    called = {name for name, _ in seen}
    chosen = {name: layer for name, layer in chosen.items() if name in called}  # not those that the model never calls
    module = Outputs()
    for name, layer in chosen.items():
        parent, _, leaf = name.rpartition(".")
        _place(module, parent).add_module(leaf, stand_in(layer, [x for other, x in seen if other == name]))
    for name, _ in seen:
        parent, _, leaf = name.rpartition(".")
        module.calls.append((module.get_submodule(parent), leaf))
    given = torch.zeros(1, device=next(bench.module.parameters()).device, dtype=bench.dtype)
    return replace(
        bench,
        module=module,
        step=lambda call: lambda: call(given),
        outputs=lambda _: [x for _, x in seen],
        layers={layers: list(chosen)},
        trains=False,
    )


def stand_in(layer: nn.Module, outputs: list[Tensor]) -> nn.Module:
    """A layer of the same class and parameters that returns these, in turns."""
    made = _class(type(layer))
    new: Any = made.__new__(made)
    new.__dict__.update(layer.__dict__, _modules={}, turn=itertools.cycle(range(len(outputs))))
    new._buffers = {f"output{index}": x for index, x in enumerate(outputs)}  # which copies share
    found: nn.Module = new
    return found


@cache
def _class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *_args: Any, **_kwargs: Any) -> Tensor:
        found: Tensor = self._buffers[f"output{next(self.turn)}"]
        return found

    return type(original.__name__, (original,), {"forward": forward})


def _place(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else []:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
