"""Generated subclasses, which modules and pipelines take on while they are observed.

One is made per class. It has the name of its original, for whoever goes by names, and cannot be imported, so copies and
pickles go by way of the original.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

_ORIGINAL = "_noesis_original"


class Generated:
    """What is put before the original among the bases of a generated subclass."""

    #: Where the original keeps it: one subclass per kind.
    slot = "_noesis_subclass"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A registry of subclasses would take the generated class for a new one.
        if _ORIGINAL not in cls.__dict__:
            super().__init_subclass__(**kwargs)


class _Kept:
    """Where a class keeps its generated subclass.

    The two refer to each other, and go together: a table of ours would keep both for ever, and a weak one would forget
    the subclass whenever nothing is observed, for which compiled code would have to be compiled again.
    """

    def __init__(self, subclass: type) -> None:
        self.subclass = subclass

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # cloudpickle sends classes of scripts by value, to where there may be no noesis


def subclass_of(original: type, slot: str = Generated.slot) -> type | None:
    """The generated subclass of a class, if it was made before."""
    kept = original.__dict__.get(slot)
    # A class made of the attributes of another one has that one's too.
    found: type | None = (
        kept.subclass if isinstance(kept, _Kept) and original_class(kept.subclass) is original else None
    )
    return found


def make_subclass(original: type, mixin: type[Generated], **body: Any) -> type:
    """Make the subclass of a class that `mixin` comes before.

    Raises:
        TypeError: when the class cannot be subclassed.
    """
    named = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    given = {**named, "__slots__": (), _ORIGINAL: original, **body}
    made: type = type(original)(original.__name__, (mixin, original), given)
    type.__setattr__(original, mixin.slot, _Kept(made))  # past a metaclass that refuses
    return made


def original_class(subclass: type) -> type:
    """The class that a generated one was made of, or the one that a class built on it by another library began with."""
    original: type = getattr(subclass, _ORIGINAL)
    return original


def plain_class(cls: type) -> type:
    """The class that is left when all generated ones are taken away."""
    while _ORIGINAL in cls.__dict__:
        cls = cls.__dict__[_ORIGINAL]
    return cls


def by_original(reduced: Any, subclass: type, make: Callable[[type], type]) -> Any:
    """What `__reduce_ex__` gave for an object, by way of its original class.

    Args:
        reduced: what its class gave.
        subclass: the class it has.
        make: from the original to the generated subclass, at an address that can be imported.
    """
    if not isinstance(reduced, tuple):
        return reduced
    function, arguments, *state = reduced
    if function is copyreg.__newobj__ and arguments[0] is subclass:  # type: ignore[attr-defined]
        return (_new, (make, plain_class(original_class(subclass)), *arguments[1:]), *state)
    if function is subclass:
        return (
            plain_class(original_class(subclass)),
            arguments,
            *state,
        )  # made anew by its own recipe, and not observed
    return reduced


def _new(make: Callable[[type], type], original: type, *args: Any) -> Any:
    made: Any = make(original)
    return made.__new__(made, *args)
