"""The moments of a tensor, merged into its layer's row."""

from .op import observe_anywhere, observe_cpu, scratch

__all__ = ["observe_anywhere", "observe_cpu", "scratch"]
