"""What a call of a module comes to, and the switch by which layers that are off call `forward` themselves."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

CALL, CALL_IMPL = Module.__call__, Module._call_impl
#: What these look at before they call forward, which is what `Observed.__call__` looks at where it does so itself.
LOOKED_AT = (
    "_compiled_call_impl", "_call_impl", "torch", "_C", "_get_tracing_state", "_slow_forward", "forward",
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_global_backward_pre_hooks",
    "_global_backward_hooks", "_global_forward_hooks", "_global_forward_pre_hooks",
)  # fmt: skip


def called_as_any(cls: type[Module]) -> bool:
    """Whether calls of a class are those of any module, in a torch whose calls we know."""
    codes = [getattr(function, "__code__", None) for function in (CALL, CALL_IMPL)]
    names = tuple(name for code in codes if code is not None for name in code.co_names)
    return cls.__call__ is CALL and cls._call_impl is CALL_IMPL and names[: len(LOOKED_AT)] == LOOKED_AT


class Switch:
    """Whether layers are passed by, in one place for all of them: they ask at every call."""

    def __init__(self) -> None:
        self.off = False
        self.cuda = self.gradients = False  # what else has to be asked
        self.classes: set[type[Module]] = set()  # that the layers had

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "classes": set()}  # a class may be one that cannot be pickled

    def add(self, cls: type[Module]) -> bool:
        """Whether a layer of this class can ask here."""
        if called_as_any(cls):
            self.classes.add(cls)
            return True
        return False

    def turn(self, off: bool, *, cuda: bool, gradients: bool) -> None:
        """Pass layers by, or do not; and not where somebody has given one of their classes another call."""
        self.off = off and all(cls.__call__ is CALL and cls._call_impl is CALL_IMPL for cls in self.classes)
        self.cuda, self.gradients = cuda, gradients


#: Of layers that have to see every call.
NEVER = Switch()
