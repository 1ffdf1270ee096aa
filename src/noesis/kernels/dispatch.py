"""What runs on the hot path: one operation per file, registered under `torch.ops.noesis`.

`rows` is the algebra of a row of statistics, `moments` measures a tensor into a row, `stepping` moves
the ring of steps, `routing` counts experts, `pooling` keeps a vector per sample; `coding`, which is
asked for and not registered, finds code lengths. Each has a path of plain torch ops that never waits
for the device. Modules named `*_triton`, `*_numba` and `*_numpy` hold what is faster on a device, and
are imported late since importing a compiler takes long.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from loguru import logger

from ..internals import recomputing

LIBRARY = torch.library.Library("noesis", "FRAGMENT")


def register(schema: str, *, cpu: Callable[..., None], anywhere: Callable[..., None]) -> None:
    """Register an operation that changes its arguments in place and returns nothing.

    `Library.define` and `impl` cost 2 us a call where `torch.library.custom_op` costs 16 to 33.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(f"{schema} -> ()")
    LIBRARY.impl(name, _unless_recomputing(cpu), "CPU")
    LIBRARY.impl(name, _unless_recomputing(anywhere), "CompositeExplicitAutograd")
    torch.library.register_fake(f"noesis::{name}", _nothing, lib=LIBRARY)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels serve this device; elsewhere plain torch ops do, at many launches a layer."""
    # AMD's compiler specialises more than `launching.Kernel` keeps apart.
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        from .probe_triton import probe

        # Triton needs a C compiler, a folder for its cache, and a device it knows: better to learn it here than
        # in a forward.
        probe(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning("no Triton on {}, so observing costs many small kernels per layer: {!r}", device, error)
        return False
    return True


@functools.cache
def by_numba(name: str) -> Any:
    """The module of the CPU kernel of this name, where Numba is installed and compiles it; None elsewhere."""
    if importlib.util.find_spec("numba") is None:
        logger.info("no Numba, so {} on the CPU takes several passes: pip install 'noesis[cpu]'", name)
        return None
    try:
        return importlib.import_module(f"{__package__}.{name}._numba")
    except Exception as error:  # a Numba that does not know this NumPy, or this processor
        logger.warning("Numba does not compile here, so {} on the CPU costs more: {!r}", name, error)
        return None


def _unless_recomputing(kernel: Callable[..., None]) -> Callable[..., None]:
    """Compiled code cannot ask in Python, which is traced away; the operation itself can."""

    def guarded(*args: Any) -> None:
        if not recomputing():
            kernel(*args)

    return guarded


def _nothing(*_: Any) -> None:
    """Under fake tensors: nothing is returned, so nothing has a shape."""
