"""Which parts of a model may be called in its place: what its `generate` runs, or a loop of somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Part(NamedTuple):
    """A module whose forward may be a step, where that of the model is not."""

    name: str
    module: nn.Module
    whole: bool  # whether it is the model but for single layers around it
    generates: bool  # whether it has a `generate` of its own, whose loop calls it


def parts_of(model: nn.Module, chosen: list[nn.Module]) -> list[Part]:
    """The parts of a model that hold chosen layers, from the outside in.

    First come those that are the model but for single layers such as a head, one in another; then those that the
    innermost of these is made of.

    Args:
        model: the one that was wrapped.
        chosen: its chosen layers.

    Examples:
        >>> from torch import nn
        >>> from noesis.layers import parts_of
        >>> body = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
        >>> model = nn.Sequential(body, nn.Linear(2, 2))
        >>> [(part.name, part.whole) for part in parts_of(model, [body[0][0], body[1][0]])]
        [('0', True), ('0.0', False), ('0.1', False)]
    """
    ids = {id(module) for module in chosen}
    found: list[Part] = []
    node, prefix = model, ""
    while True:
        below = [(name, module) for name, module in _called(node, prefix) if _has_children(module)]
        holding = [(name, module) for name, module in below if any(id(inner) in ids for inner in module.modules())]
        if len(holding) != 1 or (len(below) > 1 and holding[0][1] is not _base_of(node)):
            break
        name, node = holding[0]
        found.append(Part(name, node, whole=True, generates=False))
        prefix = f"{name}."
    return found + [
        Part(name, module, whole=False, generates=callable(getattr(module, "generate", None)))
        for name, module in holding
    ]


def _called(node: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module, in the place of lists and dicts of modules those in them."""
    for name, child in node.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _base_of(node: nn.Module) -> Any:
    """What a library says is the model inside of another: `base_model` of transformers and PEFT."""
    try:
        return getattr(node, "base_model", None)
    except Exception:  # a property of a stranger
        return None
