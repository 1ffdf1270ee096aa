"""Which tensor of a module's output is its hidden state, and what this process holds of it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from ..internals.tensors import local_part


def hidden_state(output: Any, index: int | None = None, depth: int = 8) -> Tensor | None:
    """The hidden-state tensor of an output: its first floating tensor, depth first.

    Args:
        output: what a module returned: a tensor, tuple, list, dict or dataclass of these.
        index: the element of a tuple or list to look at first, where the library that wrote the
            module says that the hidden state is not in the first place.
        depth: how deep to look, since an output may hold itself.

    Returns:
        The tensor itself (not a copy), or None when there is no floating tensor.

    Example:
        >>> import torch
        >>> from noesis.layers.outputs import hidden_state
        >>> hidden_state((torch.arange(3), {"h": torch.ones(2, 4)})).shape
        torch.Size([2, 4])
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if index is not None and isinstance(output, (tuple, list)) and index < len(output):
        found = hidden_state(output[index], None, depth - 1)
        if found is not None:
            return found
    scalar = None
    for element in _elements(output) if depth > 0 else []:
        found = hidden_state(element, None, depth - 1)
        if found is not None and found.dim() > 0:
            return found
        scalar = found if scalar is None else scalar  # a loss in front is not the hidden state
    return scalar


def _elements(output: Any) -> list[Any]:
    if isinstance(output, (tuple, list)):
        return list(output)
    if isinstance(output, dict):
        return list(output.values())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    return []


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor, of which each rank holds a part."""
    api = sys.modules.get("torch.distributed.tensor")  # takes a second to import; without it there is no DTensor
    return api is not None and isinstance(x, api.DTensor)


def part_here(x: Any) -> Any:
    """What this process holds of a tensor: its part of a DTensor, and what a collective brings once it is there.

    Nothing is sent. Waiting for a collective is what the first operation on its tensor does.

    Returns:
        The part, `x` itself where it is a tensor of another kind, or the reason why the part says nothing, a str.
    """
    if is_dtensor(x):
        if any(placement.is_partial() for placement in x.placements):
            return "a DTensor with the placement Partial, a sum over ranks that is not taken yet"
        x = local_part(x)
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(x, collectives.AsyncCollectiveTensor):
        with torch.no_grad():
            return x.trigger_wait()
    return x


def part_emitted(x: Any) -> Any:
    """What compiled code holds of a DTensor in this process; None where the part says nothing."""
    if any(placement.is_partial() for placement in x.placements):
        return None
    return x.detach().to_local()


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any], depth: int = 3) -> int:
    """The batch size of a call: the first dimension of its first tensor argument, 1 without one.

    A mapping or tuple of tensors is looked into; a list of tensors is a batch of as many.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            if value.dim() > 0:
                return value.size(0)  # unlike .shape, nested tensors have it
        elif isinstance(value, list) and value and all(isinstance(element, torch.Tensor) for element in value):
            return len(value)
        elif isinstance(value, (dict, tuple)) and depth > 0:
            inside = batch_of((), value, depth - 1) if isinstance(value, dict) else batch_of(value, {}, depth - 1)
            if inside > 1:
                return inside
    return 1
