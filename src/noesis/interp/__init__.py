"""Looking inside and intervening, by sites: what a model is made of, what its parts compute, and what they cause."""

from .anatomy import Anatomy, anatomy
from .checks import Check
from .edit_files import Edits
from .editing import Editing, editing
from .edits import Add, Custom, Edit, Noise, Project, Scale, When, Zero
from .identifying import Block
from .replacements import Freeze, Mean, Patch, Resample
from .running import Run, run
from .sites import Site

__all__ = [
    "Add",
    "Anatomy",
    "Block",
    "Check",
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
    "When",
    "Zero",
    "anatomy",
    "editing",
    "run",
]
