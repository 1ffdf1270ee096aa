"""Looking inside and intervening, by sites: what a model is made of, what its parts compute, and what they cause."""

from .anatomy import Anatomy, anatomy
from .checks import Check
from .coders import SparseCoder
from .edit_files import Edits
from .editing import Editing, editing
from .edits import Add, Custom, Edit, Noise, Project, Scale, When, Zero
from .identifying import Block
from .replacements import Freeze, Mean, Patch, Resample
from .running import Run, run
from .sites import Site
from .splicing import CoderQuality, Splice, coder_quality

__all__ = [
    "Add",
    "Anatomy",
    "Block",
    "Check",
    "CoderQuality",
    "Custom",
    "Edit",
    "Editing",
    "Edits",
    "Freeze",
    "Mean",
    "Noise",
    "Patch",
    "Project",
    "Resample",
    "Run",
    "Scale",
    "Site",
    "SparseCoder",
    "Splice",
    "When",
    "Zero",
    "anatomy",
    "coder_quality",
    "editing",
    "run",
]
