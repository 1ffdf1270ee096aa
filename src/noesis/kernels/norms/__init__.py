"""Euclidean norms of parameters, of their gradients, and of what changed in them."""

from .op import GRADIENT, UPDATE, VALUE, observe

__all__ = ["GRADIENT", "UPDATE", "VALUE", "observe"]
