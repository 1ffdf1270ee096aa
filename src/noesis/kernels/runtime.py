"""State on a device that stays where it is: copies and pickles by value, arrays over the same memory."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..internals import stays, undisturbed

K = TypeVar("K")


def by_value(state: dict[K, Any]) -> dict[K, Any]:
    """The state of an object for a copy or a pickle, with its tensors by value; `from_value` takes it back.

    Between processes torch would hand the tensors over as shared memory: it moves them there, away from
    whoever knows their address, and the other process would write its steps among ours.
    """
    return {name: _Value(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def from_value(state: dict[K, Any]) -> dict[K, Any]:
    """What `by_value` made, with tensors again, which stay where they are."""
    return {name: value.tensor() if isinstance(value, _Value) else value for name, value in state.items()}


def as_array(tensor: torch.Tensor) -> Any:
    """A tensor of the host as an array that shares its memory; None for others, such as fake ones."""
    if tensor.device.type != "cpu":
        return None
    try:
        return tensor.numpy()
    except RuntimeError:  # Dynamo copies modules without their data, where its modes cannot be left
        return None


class _Value:
    """A copy of a tensor: on the host as an array, which torch does not share, and else as a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        with undisturbed(), torch.inference_mode(False):
            copy = tensor.clone()
        array = as_array(copy)
        self.copy = copy if array is None else array

    def tensor(self) -> torch.Tensor:
        with undisturbed(), torch.inference_mode(False):
            copy = self.copy if isinstance(self.copy, torch.Tensor) else torch.from_numpy(self.copy)
            return stays(copy.clone())
