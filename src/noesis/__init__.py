"""noesis: see what happens inside a PyTorch model while it runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loguru import logger as _logger

from ._version import __version__

if TYPE_CHECKING:
    from .errors import NoesisError, NoesisWarning
    from .observing.observed import Observed
    from .results.activations import Activations
    from .results.comparison import Comparison, compare
    from .results.divergence import Divergence
    from .results.routes import Routes
    from .results.soulprint import Soulprint
    from .results.surprise import Surprise
    from .results.token_deltas import TokenDeltas, token_deltas
    from .results.trace import Trace
    from .surprise.calibration import Calibration
    from .surprise.codebook import Codebook
    from .surprise.drift import DriftMonitor
    from .wrapping.alarms import Alarm, Alarms
    from .wrapping.capture import capture
    from .wrapping.run_state import RunState
    from .wrapping.wrap import wrap
    from .wrapping.wrapped import Wrapped

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
    "Activations": "wrapping.capture",
    "Alarm": "wrapping.alarms",
    "Alarms": "wrapping.alarms",
    "Calibration": "surprise.calibration",
    "Codebook": "surprise.codebook",
    "Comparison": "results.comparison",
    "Divergence": "results.divergence",
    "DriftMonitor": "surprise.drift",
    "NoesisError": "errors",
    "NoesisWarning": "errors",
    "Observed": "observing.observed",
    "Routes": "results.routes",
    "RunState": "wrapping.run_state",
    "Soulprint": "results.soulprint",
    "Surprise": "results.surprise",
    "TokenDeltas": "results.token_deltas",
    "Trace": "results.trace",
    "Wrapped": "wrapping.wrap",
    "capture": "wrapping.capture",
    "compare": "results.comparison",
    "token_deltas": "results.token_deltas",
    "wrap": "wrapping.wrap",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
