"""Other ways of looking at layers, re-implemented from their described behaviour.

A peer is attached to named layers of a module, observes every forward, tells what it saw, and is
detached again. Where there was a choice, the cheaper one was taken in the peer's favour.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from timing import version
from torch import Tensor, nn

Read = dict[str, dict[str, float]]


class UnsuitableError(Exception):
    """A peer that does not apply here, and why."""


class Peer:
    """Forward hooks on named layers.

    Attributes:
        name: as given to `--peers`.
        waits: whether it waits for the device, or hands it values, within a step: no graph can hold that.
        layers: the layers it looks at, by name.
    """

    name: ClassVar[str]
    waits: ClassVar[bool] = False

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        """Attach to the layers of these names."""
        self.layers = {name: module.get_submodule(name) for name in names}
        self.prepare(next(tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())))
        self.handles = [
            layer.register_forward_hook(partial(self._hook, index, name))
            for index, (name, layer) in enumerate(self.layers.items())
        ]

    def _hook(self, index: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
        x = tensor_of(output)
        if x is not None:
            self.look(index, name, x.detach())

    def prepare(self, device: torch.device) -> None:
        """Make what observing needs."""

    def look(self, index: int, name: str, x: Tensor) -> None:
        """Observe one output."""
        raise NotImplementedError

    def read(self) -> Read:
        """What was seen, by layer; layers that did not run are left out."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what was seen."""
        raise NotImplementedError

    def detach(self) -> None:
        """Leave the module as it was."""
        for handle in self.handles:
            handle.remove()


class Control(Peer):
    """Nothing at all: a second bare copy, whose ratio to the first is the noise of the measurement."""

    name = "control"

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        self.layers = {name: module.get_submodule(name) for name in names}
        self.handles = []

    def read(self) -> Read:
        """No values, of every layer."""
        return {name: {} for name in self.layers}

    def forget(self) -> None:
        """Nothing to forget."""


class Hooks(Peer):
    """noesis v0.1: five statistics in a hook, each brought to the host at once."""

    name = "hooks"
    waits = True

    def prepare(self, device: torch.device) -> None:
        """Keep the floats of each layer."""
        self.seen: dict[str, tuple[float, ...]] = {}

    def look(self, index: int, name: str, x: Tensor) -> None:
        """Five reductions, five waits."""
        x = x.float()
        self.seen[name] = float(x.mean()), float(x.std()), float(x.abs().mean()), float(x.max()), float(x.min())

    def read(self) -> Read:
        """The five floats."""
        fields = ("mean", "std", "abs_mean", "max", "min")
        return {name: dict(zip(fields, row, strict=True)) for name, row in self.seen.items()}

    def forget(self) -> None:
        """Drop the floats."""
        self.seen.clear()


class TorchOps(Peer):
    """The seven statistics of noesis as separate torch ops into a buffer on the device, without waiting.

    Non-finite elements are counted, but not kept out of the other statistics, which costs less.
    """

    name = "torch-ops"
    fields = ("count", "mean", "std", "abs_mean", "min", "max", "nonfinite")

    def prepare(self, device: torch.device) -> None:
        """One row per layer."""
        self.rows = torch.zeros(len(self.layers), len(self.fields), device=device)

    def look(self, index: int, name: str, x: Tensor) -> None:
        """One op after the other."""
        x = x.float()
        nonfinite = (~x.isfinite()).sum().float()
        count = x.numel() - nonfinite
        self.rows[index] = torch.stack([count, x.mean(), x.std(), x.abs().mean(), x.amin(), x.amax(), nonfinite])

    def read(self) -> Read:
        """The rows, on the host."""
        return _by_name(self.layers, self.fields, self.rows)

    def forget(self) -> None:
        """Clear the rows."""
        self.rows.zero_()


class Composer(Peer):
    """Composer's activation monitor at every step: statistics over the last dimension, averaged, as floats.

    Of outputs only; the monitor looks at inputs too.
    """

    name = "composer"
    waits = True

    def prepare(self, device: torch.device) -> None:
        """Keep the metrics that a logger would be handed."""
        self.metrics: Read = {}

    def look(self, index: int, name: str, x: Tensor) -> None:
        """L2 norm, average, largest value, skewness and kurtosis."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1)
        self.metrics[name] = {
            "l2_norm": torch.linalg.vector_norm(x, dim=-1).mean().item(),
            "average": x.mean().item(),
            "max": x.amax(-1).mean().item(),
            "skewness": (centred.pow(3).mean(-1) / variance.pow(1.5)).mean().item(),
            "kurtosis": (centred.pow(4).mean(-1) / variance.square()).mean().item(),
        }

    def read(self) -> Read:
        """The metrics."""
        return dict(self.metrics)

    def forget(self) -> None:
        """Drop the metrics."""
        self.metrics.clear()


class Atomics(Peer):
    """One Triton kernel per tensor with float atomics, as torchtitan's `tensor_logging` has it."""

    name = "atomics"

    def prepare(self, device: torch.device) -> None:
        """One row per layer, and the flag that switches it off on the device."""
        if device.type != "cuda":
            raise UnsuitableError("a Triton kernel: it needs a CUDA device")
        if version("triton") is None:
            raise UnsuitableError("triton is not installed")
        from atomics import FIELDS, accumulate

        self.fields, self.accumulate = FIELDS, accumulate
        self.rows = torch.zeros(len(self.layers), len(FIELDS), device=device)
        self.each = list(self.rows)
        self.enabled = torch.ones((), dtype=torch.int32, device=device)

    def look(self, index: int, name: str, x: Tensor) -> None:
        """One launch."""
        self.accumulate(x, self.each[index], self.enabled)

    def read(self) -> Read:
        """The rows, on the host."""
        return _by_name(self.layers, self.fields, self.rows)

    def forget(self) -> None:
        """Clear the rows."""
        self.rows.zero_()


class Cache(Peer):
    """A copy of every output kept until the next step, as TransformerLens' `run_with_cache` keeps them."""

    name = "cache"

    def prepare(self, device: torch.device) -> None:
        """Keep the copies."""
        self.kept: dict[str, Tensor] = {}

    def look(self, index: int, name: str, x: Tensor) -> None:
        """One copy."""
        self.kept[name] = x.clone()

    def read(self) -> Read:
        """The mean of each copy: the copies themselves are in `kept`."""
        return {name: {"mean": x.double().mean().item()} for name, x in self.kept.items()}

    def forget(self) -> None:
        """Let the copies go."""
        self.kept.clear()

    def detach(self) -> None:
        """Leave the module as it was, and let the copies go."""
        super().detach()
        self.forget()


class Nervecode(Peer):
    """nervecode 0.1.1: its wrappers, with the defaults of its `wrap`, in the place of Linear and Conv2d layers.

    The layers run its coding at every forward. What its container does beside that at each call
    (it walks all modules and gathers the traces) is left out.
    """

    name = "nervecode"
    waits = True  # its assignment makes a tensor from a host value at every call

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        """Put its wrappers where it has one for the layer."""
        if version("nervecode") is None:
            raise UnsuitableError("not installed: pip install -e '.[benchmark]'")
        from nervecode.layers.wrap import wrap

        names = list(names)
        found = {name: module.get_submodule(name) for name in names}
        self.module = module
        self.layers = {name: layer for name, layer in found.items() if isinstance(layer, (nn.Linear, nn.Conv2d))}
        if not self.layers:
            raise UnsuitableError(f"none of the {len(names)} layers is an nn.Linear or nn.Conv2d, all it can wrap")
        wrap(module, layers=list(self.layers))
        self.wrappers: dict[str, Any] = {name: module.get_submodule(name) for name in self.layers}
        for name, wrapper in self.wrappers.items():
            # It makes its codebooks in float32 on the CPU, whatever the layer is.
            wrapper.codebook.to(self.layers[name].weight.device, self.layers[name].weight.dtype)

    def read(self) -> Read:
        """The mean code length of each layer, in nats."""
        lengths = {name: wrapper.mean_code_length() for name, wrapper in self.wrappers.items()}
        return {name: {"code_length": length} for name, length in lengths.items() if length is not None}

    def forget(self) -> None:
        """Drop the wrappers' traces."""
        for wrapper in self.wrappers.values():
            wrapper.clear_last_trace()

    def detach(self) -> None:
        """Put the layers back."""
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            self.module.get_submodule(parent)._modules[leaf] = layer


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Control, Hooks, TorchOps, Composer, Atomics, Cache, Nervecode)
}


def attach(name: str, module: nn.Module, layers: Iterable[str]) -> Peer:
    """Attach a peer to named layers; its `detach()` takes it off again.

    Raises:
        UnsuitableError: when it does not apply to these layers or this device.
    """
    return PEERS[name](module, layers)


def tensor_of(output: Any) -> Tensor | None:
    """The first floating tensor of what a layer returned."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := tensor_of(part)) is not None), None)


def _by_name(names: Iterable[str], fields: tuple[str, ...], rows: Tensor) -> Read:
    found = zip(names, rows.tolist(), strict=True)
    return {name: dict(zip(fields, row, strict=True)) for name, row in found if row[0]}  # the first field is the count
