"""The hot path: observed classes, sites, the recorder and its banks, channels, pipelines."""

from .attach import observe
from .channels import Channels
from .gradients import GradientRecorder
from .observed import Observed, restore, site_of
from .pipelines import Pipeline
from .recorder import Recorder

__all__ = ["Channels", "GradientRecorder", "Observed", "Pipeline", "Recorder", "observe", "restore", "site_of"]
