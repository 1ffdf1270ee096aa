"""Looking inside and intervening, by sites: what a model is made of, what its parts compute, and what they cause."""

from .anatomy import Anatomy, anatomy
from .checks import Check
from .coders import SparseCoder
from .contributing import contributions
from .contributions import Contribution, Contributions
from .edit_files import Edits
from .editing import Editing, editing
from .edits import Add, Custom, Edit, Noise, Project, Scale, When, Zero
from .identifying import Block
from .lens import Lens, Prediction
from .lenses import logit_lens
from .replacements import Freeze, Mean, Patch, Resample
from .running import Run, run
from .sites import Site
from .splicing import CoderQuality, Splice, coder_quality
from .tuned_lens import TunedLens

__all__ = [
    "Add",
    "Anatomy",
    "Block",
    "Check",
    "CoderQuality",
    "Contribution",
    "Contributions",
    "Custom",
    "Edit",
    "Editing",
    "Edits",
    "Freeze",
    "Lens",
    "Mean",
    "Noise",
    "Patch",
    "Prediction",
    "Project",
    "Resample",
    "Run",
    "Scale",
    "Site",
    "SparseCoder",
    "Splice",
    "TunedLens",
    "When",
    "Zero",
    "anatomy",
    "coder_quality",
    "contributions",
    "editing",
    "logit_lens",
    "run",
]
