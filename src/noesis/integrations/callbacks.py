"""What the callbacks for trainers have in common.

No trainer's package is imported: trainers call their callbacks by the names of their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from ..errors import BadType, BadValue
from ..files import writer
from ..results import STATS
from ..wrapping import Alarms, Wrapped


class Callback:
    """Reads a wrapped model every so many steps, and does nothing at all other events."""

    def __init__(
        self,
        wrapped: Wrapped,
        target: Any = None,
        *,
        every: int | None = None,
        alarms: Alarms | None = None,
        layers: Literal["aggregate", "each"] | Sequence[str] = "aggregate",
        stats: Sequence[str] = STATS,
    ) -> None:
        if not isinstance(wrapped, Wrapped):
            raise BadType(
                f"NoesisCallback({type(wrapped).__name__})", "what noesis.wrap returned", "Wrap the model first"
            )
        if every is not None and (not isinstance(every, int) or every < 1):
            raise BadValue(f"every={every!r}", "a whole number from 1", "Leave every out for the trainer's own")
        if alarms is not None and not isinstance(alarms, Alarms):
            raise BadType(f"alarms={alarms!r}", "noesis.Alarms(wrapped)", "Leave alarms out for none")
        if target is not None and not self.reports(target):
            writer(target)  # says now what is wrong with it, not after the first steps
        self.wrapped, self.target, self.every, self.alarms = wrapped, target, every, alarms
        self._what: dict[str, Any] = {"layers": layers, "stats": stats}
        self._paused: AbstractContextManager[Wrapped] | None = None

    @staticmethod
    def reports(target: Any) -> bool:
        """Whether a target is the trainer itself."""
        return False

    def look(self, target: Any, step: int) -> None:
        """Log the latest forward to a target, unless it is None, and look for alarms."""
        if target is not None:
            self.wrapped.log_to(target, step, **self._what)
        if self.alarms is not None:
            self.alarms.check(step)

    def weigh(self) -> None:
        """Measure the parameters, if the model was wrapped for it."""
        if self.wrapped._recorder.weights is not None:
            self.wrapped.weigh(every=1)

    def pause(self) -> None:
        """Look away, until `resume`."""
        if self._paused is None:
            self._paused = self.wrapped.paused()
            self._paused.__enter__()

    def resume(self) -> None:
        """Go on as before `pause`."""
        if self._paused is not None:
            paused, self._paused = self._paused, None
            paused.__exit__(None, None, None)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_") and name not in ("setup", "teardown"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """An event that does not matter."""
