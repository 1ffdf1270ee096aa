"""The part of `Wrapped` that is the model: whatever is not noesis' own is asked of the model, and set on it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

#: noesis' own where the model has no attribute of that name; the other public names of `Wrapped` are always.
YIELDING = frozenset({"model", "layers", "codebooks", "calibration"})

# What Python looks up on classes. A container has those of these that its model has, so that others fail as there.
_CONTAINER = "len length_hint getitem setitem delitem iter next reversed contains bool"
_CONTEXT = "enter exit aenter aexit await aiter anext"
_ARITHMETIC = (
    "add radd iadd sub rsub isub mul rmul imul matmul rmatmul imatmul truediv rtruediv itruediv floordiv mod pow "
    "and rand iand or ror ior xor rxor ixor lshift rshift neg pos abs invert int float complex index"
)
OPERATORS = [f"__{name}__" for name in f"{_CONTAINER} {_CONTEXT} {_ARITHMETIC}".split()]


class ModelProxy:
    """A model to whoever holds it: its attributes, its class, its operators.

    Attributes:
        observed_model: the model itself, the very object that was given.
    """

    observed_model: Any
    _root: nn.Module
    _pipeline: Any
    _own: frozenset[str]
    _importable: type | None = None  # the class that this one was made from, for its model

    def __init_subclass__(cls) -> None:
        public = {name for base in cls.__mro__ for name in vars(base) if not name.startswith("_")}
        cls._own = frozenset(public - YIELDING - set(dir(nn.Module))) | {"observed_model"}

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The model's class: the Trainer of transformers, say, reads from it what forward takes and how to save."""
        return type(self.__dict__.get("observed_model", self))  # a copy that is being made has no model yet

    @property
    def forward(self) -> Any:
        """The model's own, so that its signature shows."""
        return self._having("forward").forward

    def __prepare_scriptable__(self) -> Any:
        """What `torch.jit.script` is to compile: the model."""
        return self.observed_model

    def __getattr__(self, name: str) -> Any:
        if "observed_model" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        own = getattr(type(self), name, None)
        if isinstance(own, property):  # it raised an AttributeError, and Python comes here before it says so
            return own.__get__(self)
        return getattr(self._having(name), name)

    def _having(self, name: str) -> Any:
        """Who is asked for a name: the model; of what a pipeline lacks, its denoiser."""
        lacks = self._pipeline is not None and not hasattr(self.observed_model, name)
        return self._root if lacks else self.observed_model

    def _yield(self, name: str, ours: Callable[[], Any]) -> Any:
        """The model's own attribute of this name; where it has none, ours."""
        model = self.observed_model
        return getattr(model, name) if hasattr(model, name) else ours()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, MethodType) and value.__self__ is self:  # accelerate binds its autocast like this
            value = MethodType(value.__func__, self.observed_model)
        if name not in self._own:
            setattr(self.observed_model, name, value)
            return
        own = getattr(type(self), name, None)
        if not isinstance(own, property) or own.fset is None:
            raise self._refusal(name, "set")
        own.__set__(self, value)

    def __delattr__(self, name: str) -> None:
        if name in self._own:
            raise self._refusal(name, "deleted")
        delattr(self.observed_model, name)

    def _refusal(self, name: str, done: str) -> AttributeError:
        # Set on the model, it would go on being read as ours.
        return AttributeError(f"{name} is noesis' own, and cannot be {done}; the model's is observed_model.{name}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # which the model may have one of its own of
        made = memo[id(self)] = _empty(self._importable or type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self._importable or type(self),), self.__dict__  # not by `__class__`, which is the model's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_class()

    def _take_class(self) -> None:
        """Have a class with what is looked up on the model's class, and nowhere else: operators, and fx its forward."""
        cls = type(self.observed_model)
        body: dict[str, Any] = {name: _delegate(name) for name in OPERATORS if hasattr(cls, name)}
        if isinstance(self.observed_model, nn.Module):
            body["forward"] = _Forward(cls.forward)
        body |= {"__doc__": type(self).__doc__, "__module__": type(self).__module__, "_importable": type(self)}
        made = type(type(self).__name__, (type(self),), body)
        vars(object)["__class__"].__set__(self, made)  # since our own `__class__` is the model's

    def __dir__(self) -> list[str]:
        denoiser = [] if self._pipeline is None else dir(self._root)
        return sorted({"observed_model", *dir(type(self)), *dir(self.observed_model), *denoiser})


def _empty(cls: type) -> Any:
    return object.__new__(cls)


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: ModelProxy, *args: Any, **kwargs: Any) -> Any:
        asked = self._having(name)
        result = getattr(asked, name)(*args, **kwargs)
        return self if result is asked else result

    method.__name__ = name
    return method


class _Forward:
    """`forward` of a container's class: a function like the model's, and on the container the model's own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        @functools.wraps(forward)
        def function(container: ModelProxy, *args: Any, **kwargs: Any) -> Any:
            return container.forward(*args, **kwargs)

        self.function = function

    def __get__(self, container: ModelProxy | None, owner: type) -> Any:
        return self.function if container is None else container.observed_model.forward


# nn.Module's own methods would act on the container; all of them are the model's.
for _name, _value in vars(nn.Module).items():
    if inspect.isfunction(_value) and not _name.startswith("__") and _name not in vars(ModelProxy):
        setattr(ModelProxy, _name, _delegate(_name))
