"""A kernel that shows whether Triton works on a device, and whether what it compiled can be launched by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from loguru import logger

from . import launching

#: More than one, so that arguments out of their places show.
SHIFT = 3


@triton.jit
def _probe(p_out, p_in, number, SHIFT: tl.constexpr):
    where = tl.program_id(0)
    tl.store(p_out + where, tl.load(p_in + where) + number * SHIFT)


def probe(device: torch.device) -> None:
    """Launch twice, through Triton and then what it compiled; waits for the device.

    Raises:
        RuntimeError: when Triton computes something else. Its own errors pass through.
    """
    given = torch.arange(2, dtype=torch.int32, device=device)
    kernel, stream = launching.Kernel(_probe, 1), launching.current_stream(device)

    def launched(number: int) -> bool:
        found = torch.zeros_like(given)
        kernel.launch(device, stream, (), (2, 1), (found, given), (number, SHIFT))
        return torch.equal(found, given + number * SHIFT)

    if not launched(5):
        raise RuntimeError("Triton's kernel for trying it wrote something else")
    try:
        if launched(7):
            return
        why = "wrote something else"
    except Exception as error:
        why = repr(error)
    launching.Kernel.direct = False
    logger.warning(
        "this Triton's compiled kernels cannot be launched by themselves ({}), so each launch costs more", why
    )
