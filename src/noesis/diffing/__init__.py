"""The same inputs through two models: what of each is kept, and where it differs."""

from .two_models import diff

__all__ = ["diff"]
