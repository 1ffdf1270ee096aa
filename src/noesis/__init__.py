"""noesis: see what happens inside a PyTorch model while it runs."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loguru import logger as _logger

from ._version import __version__

if TYPE_CHECKING:
    from .alarms import Alarm, Alarms
    from .calibration import Calibration
    from .capture import Activations, capture
    from .codebook import Codebook
    from .comparison import Comparison, Divergence, compare
    from .drift import DriftMonitor
    from .errors import NoesisError, NoesisWarning
    from .observing import Observed
    from .routes import Routes
    from .run_state import RunState
    from .soulprint import Soulprint
    from .surprise import Surprise
    from .tokens import TokenDeltas, token_deltas
    from .trace import Trace
    from .wrapping import Wrapped, wrap

_logger.disable("noesis")  # a library is quiet; `logger.enable("noesis")` lets it speak

__all__ = [
    "Activations",
    "Alarm",
    "Alarms",
    "Calibration",
    "Codebook",
    "Comparison",
    "Divergence",
    "DriftMonitor",
    "NoesisError",
    "NoesisWarning",
    "Observed",
    "Routes",
    "RunState",
    "Soulprint",
    "Surprise",
    "TokenDeltas",
    "Trace",
    "Wrapped",
    "__version__",
    "capture",
    "compare",
    "token_deltas",
    "wrap",
]

# Where each name lives. It is imported at first use, so that `noesis --help` does not wait for torch.
_HOMES = {
    "Activations": "capture",
    "Alarm": "alarms",
    "Alarms": "alarms",
    "Calibration": "calibration",
    "Codebook": "codebook",
    "Comparison": "comparison",
    "Divergence": "comparison",
    "DriftMonitor": "drift",
    "NoesisError": "errors",
    "NoesisWarning": "errors",
    "Observed": "observing",
    "Routes": "routes",
    "RunState": "run_state",
    "Soulprint": "soulprint",
    "Surprise": "surprise",
    "TokenDeltas": "tokens",
    "Trace": "trace",
    "Wrapped": "wrapping",
    "capture": "capture",
    "compare": "comparison",
    "token_deltas": "tokens",
    "wrap": "wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: a public name is never shadowed by the submodule of the same name.

    Python sets each imported submodule as an attribute of its package; `noesis.capture` is to be
    the function, whether or not `noesis/capture.py` was imported before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
