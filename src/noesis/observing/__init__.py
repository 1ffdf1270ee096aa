"""The hot path: observed classes, sites, the recorder and its banks, channels, pipelines."""

from .attach import detach, observe
from .channels import Channels
from .gradients import GradientRecorder
from .observed import Observed, plain, site_of
from .padding import Trial, Tried
from .pipelines import Pipeline
from .recorder import Recorder
from .weights import Weights

__all__ = [
    "Channels",
    "GradientRecorder",
    "Observed",
    "Pipeline",
    "Recorder",
    "Trial",
    "Tried",
    "Weights",
    "detach",
    "observe",
    "plain",
    "site_of",
]
