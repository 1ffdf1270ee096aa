"""The container: wrap, Wrapped, capture, RunState, Alarms."""

from .alarms import Alarm, AlarmRaised, Alarms
from .calibration_loop import evaluating, moved_to
from .capturing import Keeping, capture, each_output
from .run_state import RunState
from .unwrapping import unwrap, unwrapped
from .wrap_model import resolve, wrap
from .wrapped import Wrapped

__all__ = [
    "Alarm",
    "AlarmRaised",
    "Alarms",
    "Keeping",
    "RunState",
    "Wrapped",
    "capture",
    "each_output",
    "evaluating",
    "moved_to",
    "resolve",
    "unwrap",
    "unwrapped",
    "wrap",
]
