"""Launching Triton kernels with little work on the host.

Triton's own launcher binds and specialises arguments at every call, 9 to 13 us; a compiled variant
called by itself costs 3 to 5. A `Kernel` therefore goes through Triton once per variant, and then
calls what that compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..internals import current_device, raw_stream

#: Streams of one device, each with scratch memory of its own; more than torch makes (129).
LANES = 160
_LANES: dict[tuple[int, int], int] = {}


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; in Triton's interpreter (on the CPU) it is only a number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream."""
    return raw_stream(device.index) if device.type == "cuda" else 0


def lane(device: torch.device, stream: int) -> int:
    """Which part of the scratch memory launches on this stream use.

    Launches on one stream follow each other; on two streams they may overlap.
    """
    key = (device.index or 0, stream)
    found = _LANES.get(key)
    if found is None:
        found = _LANES[key] = sum(index == key[0] for index, _ in _LANES) % LANES
    return found


class Kernel:
    """A Triton kernel and its compiled variants.

    Args:
        function: what `triton.jit` returned.
        warps: warps per program.

    Attributes:
        direct: whether what Triton compiled takes its arguments as we know it; `probe_triton` finds out.
    """

    direct = True

    def __init__(self, function: Any, warps: int) -> None:
        self.function = function
        self.warps = warps
        self.compiled: dict[Any, Any] = {}

    def launch(
        self,
        device: torch.device,
        stream: int,
        variant: tuple[Any, ...],
        grid: tuple[int, int],
        pointers: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
    ) -> None:
        """Launch on the device's current stream.

        Args:
            device: that all tensors are on.
            stream: from `current_stream`.
            variant: whatever makes Triton compile another variant: dtypes, alignments, constexprs.
            grid: programs along two axes.
            pointers: the kernel's first arguments.
            numbers: the others, constexprs included.
        """
        if device.type == "cuda" and current_device() != device.index:
            with torch.cuda.device(device):
                self.launch(device, stream, variant, grid, pointers, numbers)
            return
        kernel = self.compiled.get((device.index, variant))
        if kernel is None:
            made = self.function[grid](*pointers, *numbers, num_warps=self.warps)
            if made is not None and self.direct:  # the interpreter compiles nothing
                self.compiled[device.index, variant] = made
            return
        addresses = [pointer.data_ptr() for pointer in pointers]
        kernel.run(
            *grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *addresses, *numbers
        )  # fmt: skip
