"""One pass with float atomics, in the manner of torchtitan's `tensor_logging`; for `peers.py`.

Every program adds its block's partial sums to the layer's row. The order of the additions is the
order in which programs finish, so two runs differ in the last bits; variance is left to the
sum of squares. A file of its own, since it needs Triton at import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = ("count", "sum", "abs_sum", "squares", "abs_max")
BLOCK = 4096


@triton.jit
def _accumulate(p_x, p_row, p_enabled, n, block: tl.constexpr):
    if tl.load(p_enabled) != 0:
        o_x = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        m_x = o_x < n
        x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_abs = tl.abs(x)
        tl.atomic_add(p_row + 0, tl.sum(m_x.to(tl.float32)))
        tl.atomic_add(p_row + 1, tl.sum(x))
        tl.atomic_add(p_row + 2, tl.sum(b_abs))
        tl.atomic_add(p_row + 3, tl.sum(x * x))
        tl.atomic_max(p_row + 4, tl.max(b_abs))


def accumulate(x: Tensor, row: Tensor, enabled: Tensor) -> None:
    """Add a tensor to a row of `FIELDS` (float32), unless the flag on the device is 0."""
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    n = x.numel()
    if n:
        _accumulate[(triton.cdiv(n, BLOCK),)](x, row, enabled, n, BLOCK)
