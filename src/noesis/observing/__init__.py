"""The hot path: observed classes, sites, the recorder and its banks, channels, pipelines."""

from .attach import detach, observe
from .channels import Channels
from .gradients import GradientRecorder
from .observed import Observed, change_beneath, plain, site_of
from .padding import Trial, Tried
from .pipelines import Pipeline
from .recorder import Recorder
from .subclassing import Generated, make_subclass, original_class, plain_class, subclass_of
from .weights import Weights

__all__ = [
    "Channels",
    "Generated",
    "GradientRecorder",
    "Observed",
    "Pipeline",
    "Recorder",
    "Trial",
    "Tried",
    "Weights",
    "change_beneath",
    "detach",
    "make_subclass",
    "observe",
    "original_class",
    "plain",
    "plain_class",
    "site_of",
    "subclass_of",
]
