"""Tests of models: snapshots of runs beside them, by a fixture of pytest."""

from .fixture import SoulprintSnapshot

__all__ = ["SoulprintSnapshot"]
