"""The ring of steps."""

from .clock import Clock
from .op import begin_anywhere, end_anywhere
from .reference import add_steps, begin_cpu, end, merge_totals, with_whole

__all__ = ["Clock", "add_steps", "begin_anywhere", "begin_cpu", "end", "end_anywhere", "merge_totals", "with_whole"]
