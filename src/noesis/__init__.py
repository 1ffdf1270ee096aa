"""noesis: see what happens inside a PyTorch model while it runs."""

from __future__ import annotations

from importlib import import_module
from sys import modules as _modules
from typing import TYPE_CHECKING, Any

from loguru import logger as _logger

from ._version import __version__

if TYPE_CHECKING:
    from .diffing import diff
    from .errors import NoesisError, NoesisWarning
    from .observing import Observed
    from .results import (
        Activations,
        Comparison,
        Divergence,
        Fidelity,
        ModelDiff,
        ParameterNorms,
        Routes,
        Soulprint,
        Surprise,
        TokenDeltas,
        Trace,
        compare,
        token_deltas,
    )
    from .surprise import Calibration, Codebook, DriftMonitor
    from .wrapping import Alarm, Alarms, RunState, Wrapped, capture, unwrap, unwrapped, wrap

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
    "Fidelity",
    "ModelDiff",
    "NoesisError",
    "NoesisWarning",
    "Observed",
    "ParameterNorms",
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
    "diff",
    "token_deltas",
    "unwrap",
    "unwrapped",
    "wrap",
]

# Where each name lives. It is imported at first use, so that `noesis --help` does not wait for torch.
_HOMES = {
    "Activations": "results",
    "Alarm": "wrapping",
    "Alarms": "wrapping",
    "Calibration": "surprise",
    "Codebook": "surprise",
    "Comparison": "results",
    "Divergence": "results",
    "Fidelity": "results",
    "DriftMonitor": "surprise",
    "NoesisError": "errors",
    "NoesisWarning": "errors",
    "ModelDiff": "results",
    "Observed": "observing",
    "ParameterNorms": "results",
    "Routes": "results",
    "RunState": "wrapping",
    "Soulprint": "results",
    "Surprise": "results",
    "TokenDeltas": "results",
    "Trace": "results",
    "Wrapped": "wrapping",
    "capture": "wrapping",
    "compare": "results",
    "diff": "diffing",
    "token_deltas": "results",
    "unwrap": "wrapping",
    "unwrapped": "wrapping",
    "wrap": "wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What a user has: the public names, imported yet or not, and packages that are loaded."""
    loaded = (name for name in globals() if name[:1] != "_" and f"{__name__}.{name}" in _modules)
    return sorted({*__all__, *loaded, *(name for name in globals() if name[:2] == "__")})
