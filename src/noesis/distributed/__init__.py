"""One result from many ranks."""

from .traces import merge

__all__ = ["merge"]
