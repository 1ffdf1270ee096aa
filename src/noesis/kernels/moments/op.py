"""The moments of a tensor, merged into its layer's row of the current step.

Doors with one meaning: a reference in torch ops that never waits for the device, a Triton kernel in
`_triton`, two CPU paths in `_numba` and `_numpy` (all three are imported late),
and `torch.ops.noesis.moments` for compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dispatch import by_numba, has_triton, register
from ..layout import ACTIVE
from .reference import DTYPES, check_room, dense_copy, observe_reference

# ---------------------------------------------------------------- CPU


def observe_cpu(
    x: Tensor,
    layer: int,
    samples: int,
    count_zeros: bool,
    slab: NDArray[np.float32],
    control: NDArray[np.int64],
) -> None:
    """Merge the moments of `x` into its layer's row, on the CPU, whose numbers can be read at once."""
    if not control[ACTIVE]:
        return
    check_room(samples, slab.shape[1] - 1)
    if x.is_neg():  # a view with a flag for its sign, which the memory does not show
        x = x.resolve_neg()
    numba = by_numba("moments")
    if numba is None or x.dtype not in DTYPES or not x.numel():
        _numpy().observe(x, samples, count_zeros, layer, slab, control)
        return
    if not x.is_contiguous():
        x = dense_copy(x, samples)
    numba.observe(x.data_ptr(), x.numel(), numba.KINDS[x.dtype], samples, count_zeros, layer, slab, control)


@functools.cache
def _numpy() -> Any:
    from . import _numpy as moments_numpy

    return moments_numpy


# ---------------------------------------------------------------- registered op


def observe_anywhere(
    x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor, scratch: Tensor
) -> None:
    """Merge the moments of `x` into the slab: by the Triton kernel where there is one for this device and dtype."""
    if x.dtype in DTYPES and has_triton(x.device):
        check_room(samples, slab.shape[1] - 1)
        _triton()(x, layer, samples, count_zeros, slab, control, scratch)
    else:
        observe_reference(x.detach(), layer, samples, count_zeros, slab, control)


@functools.cache
def _triton() -> Callable[..., None]:
    from ._triton import observe_triton

    return observe_triton


def _op_cpu(
    x: Tensor, layer: Tensor, samples: int, count_zeros: bool, slab: Tensor, control: Tensor, _scratch: Tensor
) -> None:
    observe_cpu(x, int(layer), samples, count_zeros, slab.numpy(), control.numpy())


register(
    "moments(Tensor x, Tensor layer, SymInt samples, bool count_zeros, "
    "Tensor(a!) slab, Tensor(b!) control, Tensor(c!) scratch)",
    cpu=_op_cpu,
    anywhere=observe_anywhere,
)


def scratch(device: torch.device, fields: int) -> torch.Tensor:
    """What the kernels of a device need beside the state, for rows of so many fields; made when wrapping."""
    if not has_triton(device):
        return torch.zeros(1, 1, dtype=torch.int32, device=device)
    from . import _triton

    return _triton.scratch(device, fields)
