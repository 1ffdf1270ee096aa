"""What a call of a module comes to, in the versions of torch whose calls we know."""

from __future__ import annotations

from typing import Any

from torch.autograd import profiler
from torch.nn import Module
from torch.nn.modules import module

from .lookup import attribute, look_up

CALL: Any = Module.__call__
CALL_IMPL: Any = attribute(Module, "_call_impl")
#: What these look at before they call forward, which is what `Observed.__call__` looks at where it does so itself.
LOOKED_AT = (
    "_compiled_call_impl", "_call_impl", "torch", "_C", "_is_tracing", "_slow_forward", "forward",
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_global_backward_pre_hooks",
    "_global_backward_hooks", "_global_forward_hooks", "_global_forward_pre_hooks",
)  # fmt: skip
_ON_INSTANCES = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
_ON_THE_MODULE = tuple(name for name in LOOKED_AT if name.startswith("_global_"))


def _as_known(call_impl: Any) -> bool:
    """Whether calls look at no more than we do, and at what is there."""
    codes = [attribute(function, "__code__") for function in (CALL, call_impl)]
    names = tuple(name for code in codes if code is not None for name in code.co_names)
    before_2_15 = tuple("_get_tracing_state" if name == "_is_tracing" else name for name in LOOKED_AT)
    if names[: len(LOOKED_AT)] not in (LOOKED_AT, before_2_15):
        return False
    bare = Module()
    there = [isinstance(attribute(module, name), dict) for name in _ON_THE_MODULE]
    there += [isinstance(attribute(bare, name), dict) for name in _ON_INSTANCES]
    there += [bare._compiled_call_impl is None, type(attribute(profiler, "_is_profiler_enabled")) is bool]
    return all(there)


KNOWN = look_up(
    "torch.nn:Module._call_impl",
    fits=_as_known,
    instead="layers that are off are called as torch calls them, half a microsecond each",
)


def called_as_any(cls: type[Module]) -> bool:
    """Whether calls of a class are those of any module, in a torch whose calls we know."""
    return KNOWN is not None and cls.__call__ is CALL and cls._call_impl is CALL_IMPL
