"""Which tensor of a module's output is its hidden state, and what this process holds of it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..internals import local_part, storageless


def hidden_state(output: Any, index: int | None = None, depth: int = 8) -> Tensor | None:
    """The hidden-state tensor of an output: its first floating tensor, depth first.

    Args:
        output: what a module returned: a tensor, tuple, list, dict or dataclass of these.
        index: the element of a tuple or list to look at first, where the library that wrote the
            module says that the hidden state is not in the first place.
        depth: how deep to look, since an output may hold itself.

    Returns:
        The tensor itself (not a copy), or None when there is no floating tensor.

    Examples:
        >>> import torch
        >>> from noesis.layers import hidden_state
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
    """The same in compiled code; None where the part says nothing."""
    if not is_dtensor(x):
        return x
    if any(placement.is_partial() for placement in x.placements):
        return None
    return x.detach().to_local()


#: What a timestep has to stay below to be recorded exactly.
LARGEST_TIMESTEP = 2.0**53


def is_number(timestep: Any) -> bool:
    """Whether there is a value to record: a fake or batched tensor has none that could be read."""
    if isinstance(timestep, (float, int)):
        return abs(timestep) < LARGEST_TIMESTEP
    if type(timestep) is not Tensor or timestep.is_complex():
        return False
    if is_compiling():
        return True
    return not (
        timestep.is_nested
        or timestep.layout != torch.strided
        or timestep.numel() == 0
        or timestep.device.type == "meta"
        or storageless(timestep)
    )


def measurable(x: Any, whole: bool = True) -> tuple[Any, str | None]:
    """What this process can measure of a hidden state: all of it, or its part of a tensor that is spread over ranks.

    Args:
        x: what is there in its place.
        whole: whether to look for a part where the whole cannot be measured.

    Returns:
        A tensor, and None; or anything, and why it cannot be measured.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        reason = "no floating tensor"
    elif x.is_nested or x.layout != torch.strided:
        reason = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
    elif x.is_meta or storageless(x):
        reason = "a tensor without data of its own (meta device or torch.func)"
    elif type(x) not in (Tensor, nn.Parameter) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        reason = f"a {type(x).__name__}"
    else:
        return x, None
    part = part_here(x) if whole else x
    if part is x:
        return x, reason
    return (part, part) if isinstance(part, str) else measurable(part, whole=False)


def unmeasurable(x: Any) -> str | None:
    """Why a hidden state cannot be measured as a whole, or None if it can."""
    return measurable(x, whole=False)[1]


def emittable(x: Any) -> TypeGuard[Tensor]:
    """Whether compiled code can measure a hidden state: what `measurable` asks, as far as shapes and layouts tell."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or x.layout != torch.strided:
        return False
    return not is_dtensor(x)  # an operation takes no DTensor among tensors
