"""Looking inside and intervening, by sites: what a model is made of, what its parts compute, and what they cause."""

from .anatomy import Anatomy, anatomy
from .attributing import attribute
from .attribution import Attribution, Disagreement
from .checks import Check
from .circuit import Circuit, CircuitComparison
from .circuits import circuit
from .coders import SparseCoder
from .contributing import contributions
from .contributions import Contribution, Contributions
from .direction_found import Cost, Direction
from .directions import direction
from .edges import Edges
from .edit_files import Edits
from .editing import Editing, editing
from .edits import Add, Custom, Edit, Noise, Project, Scale, When, Zero
from .effects import Effect, Effects
from .head_scores import HeadScore, HeadScores
from .heads import heads
from .identifying import Block
from .importance import Importance, importance
from .lens import Lens, Prediction
from .lenses import logit_lens
from .metrics import Metric, answer_probability, kl, logit_difference
from .neuron_examples import Example, Neurons
from .neurons import neurons
from .patching import patch
from .paths import paths
from .probe_scores import Probe
from .probes import probe
from .replacements import Freeze, Mean, Patch, Resample
from .running import Run, run
from .sites import Edge, Site
from .splicing import CoderQuality, Splice, coder_quality
from .tuned_lens import TunedLens
from .untrained import untrained

__all__ = [
    "Add",
    "Anatomy",
    "Attribution",
    "Block",
    "Check",
    "Circuit",
    "CircuitComparison",
    "CoderQuality",
    "Contribution",
    "Contributions",
    "Cost",
    "Custom",
    "Direction",
    "Disagreement",
    "Edge",
    "Edges",
    "Edit",
    "Editing",
    "Edits",
    "Effect",
    "Effects",
    "Example",
    "Freeze",
    "HeadScore",
    "HeadScores",
    "Importance",
    "Lens",
    "Mean",
    "Metric",
    "Neurons",
    "Noise",
    "Patch",
    "Prediction",
    "Probe",
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
    "attribute",
    "circuit",
    "coder_quality",
    "contributions",
    "direction",
    "editing",
    "heads",
    "importance",
    "kl",
    "logit_difference",
    "logit_lens",
    "neurons",
    "patch",
    "paths",
    "probe",
    "run",
    "untrained",
]
