"""Looking inside and intervening, by sites: what a model is made of, what its parts compute, and what they cause."""

from .anatomy import Anatomy, anatomy
from .checks import Check
from .coders import SparseCoder
from .contributing import contributions
from .contributions import Contribution, Contributions
from .edit_files import Edits
from .editing import Editing, editing
from .edits import Add, Custom, Edit, Noise, Project, Scale, When, Zero
from .effects import Effect, Effects
from .identifying import Block
from .lens import Lens, Prediction
from .lenses import logit_lens
from .metrics import Metric, answer_probability, kl, logit_difference
from .patching import patch
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
    "Effect",
    "Effects",
    "Freeze",
    "Lens",
    "Mean",
    "Metric",
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
    "answer_probability",
    "coder_quality",
    "contributions",
    "editing",
    "kl",
    "logit_difference",
    "logit_lens",
    "patch",
    "run",
]
