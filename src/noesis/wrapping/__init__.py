"""The container: wrap, Wrapped, capture, RunState, Alarms."""

from .alarms import Alarm, AlarmRaised, Alarms
from .calibration_loop import evaluating
from .capturing import capture
from .run_state import RunState
from .unwrapping import unwrap, unwrapped
from .wrap_model import wrap
from .wrapped import Wrapped

__all__ = [
    "Alarm",
    "AlarmRaised",
    "Alarms",
    "RunState",
    "Wrapped",
    "capture",
    "evaluating",
    "unwrap",
    "unwrapped",
    "wrap",
]
