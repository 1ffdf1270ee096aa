"""What a tensor is: one of a tracer, one without data of its own, or a part of a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .calls import CALL
from .lookup import attribute, look_up


def _is_no(ask: Any) -> bool:
    return ask() is False


def _fx_by_stack() -> bool:
    """Whether a tracer of torch.fx is at work: it puts a call of its own in the place of modules'."""
    if Module.__call__ is CALL:
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "trace" and str(frame.f_globals.get("__name__")).startswith("torch.fx"):
            return True
        frame = frame.f_back
    return False


#: Whether torch.fx traces symbolically; `torch.compiler.is_compiling` says the rest.
traced_by_fx: Callable[[], bool] = (
    # Before 2.9 it had the second name, which tells of it in a log since.
    look_up(
        "torch.fx._symbolic_trace:is_fx_symbolic_tracing",
        "torch.fx._symbolic_trace:is_fx_tracing",
        fits=_is_no,
        instead="its tracers are told by who called",
    )
    or _fx_by_stack
)

#: Whether torch.jit traces.
traced_by_jit: Callable[[], bool] = (
    look_up("torch._C:_is_tracing", fits=_is_no, instead="torch.jit.is_tracing is asked") or torch.jit.is_tracing  # type: ignore[attr-defined]
)


def _no_storage(x: Tensor) -> bool:
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return True
    return False


#: Whether a tensor is one of torch.func's (vmap, grad), which has no data of its own.
storageless: Callable[[Tensor], bool] = (
    look_up(
        "torch._C:_functorch.is_functorch_wrapped_tensor",
        fits=lambda ask: ask(torch.empty(0, device="cpu")) is False,
        instead="tensors of torch.func are told by having no storage",
    )
    or _no_storage
)


def local_part(x: Any) -> Tensor:
    """This process' part of a DTensor, without a step of autograd."""
    part = attribute(x, "_local_tensor")
    if isinstance(part, Tensor):
        return part
    whole: Any = x.detach()
    local: Tensor = whole.to_local()
    return local


def _norms_fit(norms: Any) -> bool:
    found = norms([torch.full((2,), 2.0**70, device="cpu")], 2.0, dtype=torch.float64)
    return bool(found[0].dtype == torch.float64 and found[0] == 2.0**70.5)


#: Norms of many tensors in few launches.
_foreach_norm = look_up("torch:_foreach_norm", fits=_norms_fit, instead="norms take a launch per tensor")


def norms_of(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Euclidean norms of tensors of one dtype and device, summed in another dtype."""
    if _foreach_norm is None or not tensors:
        return [torch.linalg.vector_norm(x, dtype=dtype) for x in tensors]
    return list(_foreach_norm(list(tensors), 2.0, dtype=dtype))
