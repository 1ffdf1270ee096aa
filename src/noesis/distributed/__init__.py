"""One result from many ranks."""

from .calibration import calibrate_over
from .traces import merge, merge_over

__all__ = ["calibrate_over", "merge", "merge_over"]
