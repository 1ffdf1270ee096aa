"""Looking inside, by sites: what a model is made of, verified, and what its parts compute."""

from .anatomy import Anatomy, anatomy
from .checks import Check
from .identifying import Block
from .running import Run, run
from .sites import Site

__all__ = ["Anatomy", "Block", "Check", "Run", "Site", "anatomy", "run"]
