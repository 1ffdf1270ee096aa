"""Every answer on the host: Trace, Soulprint, Comparison, Surprise, Routes, Activations, TokenDeltas."""

from .activations import Activations, bytes_of
from .comparison import Comparison, compare
from .divergence import Divergence
from .loading import load_run, load_runs
from .named_scalars import STATS, scalars, under
from .routes import Routes
from .soulprint import Soulprint
from .statistics import ALWAYS, OPTIONAL, fields_of, stats_of
from .surprise import LayerSurprise, Reason, Surprise
from .tokens import TokenDeltas, token_deltas
from .trace import Trace

__all__ = [
    "ALWAYS",
    "OPTIONAL",
    "STATS",
    "Activations",
    "Comparison",
    "Divergence",
    "LayerSurprise",
    "Reason",
    "Routes",
    "Soulprint",
    "Surprise",
    "TokenDeltas",
    "Trace",
    "bytes_of",
    "compare",
    "fields_of",
    "load_run",
    "load_runs",
    "scalars",
    "stats_of",
    "token_deltas",
    "under",
]
