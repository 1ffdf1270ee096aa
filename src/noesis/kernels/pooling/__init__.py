"""A vector per sample of a layer's output."""

from .op import pool_anywhere, pool_cpu
from .reference import CALLS, FORWARD, STAMP, by_position, pooled, width

__all__ = ["CALLS", "FORWARD", "STAMP", "by_position", "pool_anywhere", "pool_cpu", "pooled", "width"]
