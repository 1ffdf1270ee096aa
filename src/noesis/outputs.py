"""Which tensor of a module's output is its hidden state."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn


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
        >>> from noesis.outputs import hidden_state
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


def stream_index(module: nn.Module) -> int | None:
    """Where diffusers' registry says a block's hidden states are among its outputs.

    The dual-stream blocks of SD3 and Flux return (text, image); the registry names the image stream.
    """
    helpers = sys.modules.get("diffusers.hooks._helpers")
    if helpers is None:  # no diffusers in this process, so no diffusers block either
        return None
    for cls in type(module).__mro__:
        try:
            metadata = helpers.TransformerBlockRegistry.get(cls)
        except ValueError:
            continue
        index: int | None = metadata.return_hidden_states_index
        return index
    return None


def register_block(original: type[nn.Module], made: type[nn.Module]) -> None:
    """Tell diffusers that a class made from one of its blocks is such a block too.

    Its caches (FirstBlockCache, MagCache) and layer skipping look blocks up by their exact class.
    """
    helpers = sys.modules.get("diffusers.hooks._helpers")
    if helpers is None:
        return
    try:
        metadata = helpers.TransformerBlockRegistry.get(original)
    except ValueError:
        return
    # A copy, since registering writes the class into what it is given.
    helpers.TransformerBlockRegistry.register(made, dataclasses.replace(metadata))


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
