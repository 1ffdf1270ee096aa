"""What noesis raises: one family, each member also the builtin a caller would expect.

A message has three parts: what was given, what was expected, what to do.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class NoesisError(Exception):
    """Everything noesis raises on purpose.

    Members are also the fitting builtin (`ValueError`, `TypeError`, `FileNotFoundError`,
    `OSError`, `ImportError`, `MemoryError`, `RuntimeError`), so code that does not know
    noesis still catches what it means to catch.

    Examples:
        >>> import noesis, torch
        >>> try:
        ...     noesis.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)), layers="atention")
        ... except noesis.NoesisError as error:
        ...     print(isinstance(error, ValueError))
        True
    """

    def __init__(self, given: str, expected: str = "", do: str = "") -> None:
        parts = [f"{given}."]
        if expected:
            parts.append(f"Expected {expected}.")
        if do:
            parts.append(f"{do}.")
        super().__init__(" ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by re-calling __init__ with args; the message is already assembled.
        return (_restore, (type(self), str(self)))


class BadValue(NoesisError, ValueError):
    """An argument has a value that makes no sense here."""


class BadType(NoesisError, TypeError):
    """An argument is of a kind noesis cannot work with."""


class BadFile(NoesisError, ValueError):
    """A file is broken, of another format, or of a version this noesis does not read."""


class MissingFile(NoesisError, FileNotFoundError):
    """A file or folder is not there, or holds nothing to read."""


class Inaccessible(NoesisError, OSError):
    """A file or folder cannot be read or written: no room, no permission, something else in its place."""


class MissingExtra(NoesisError, ImportError):
    """An optional package is needed and not installed."""


class TooLarge(NoesisError, MemoryError):
    """Keeping this would take more memory than was allowed."""


class WrongState(NoesisError, RuntimeError):
    """The call is fine, but not now."""


class NotThere(WrongState, AttributeError):
    """An attribute is not there in this state, which `hasattr` and `getattr(..., default)` have to see."""


class TimedOut(NoesisError, TimeoutError):
    """Others were waited for, and did not come."""


class NoesisWarning(UserWarning):
    """What noesis warns of: an alarm, or p-values that may promise nothing."""


def _restore(kind: type[NoesisError], message: str) -> NoesisError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Examples:
        >>> from noesis.errors import require
        >>> require("json", extra="viz", purpose="plots").__name__
        'json'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise MissingExtra(
            f"{purpose} needs the package {missing!r}, which is not installed",
            expected=f"the extra {extra!r}",
            do=f"Run: pip install 'noesis[{extra}]'",
        ) from None
