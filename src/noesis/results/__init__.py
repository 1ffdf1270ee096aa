"""Every answer on the host: Trace, Soulprint, Comparison, Surprise, Routes, Activations, TokenDeltas."""

from .activations import Activations, bytes_of
from .columns import COLUMNS, from_known, from_rows, merged_known, names_of, to_known, to_rows
from .comparing import compare, effect_sizes
from .comparison import Comparison
from .divergence import Divergence, allowances, allowed, divergences, rounding
from .fidelity import Fidelity
from .loading import load_run, load_runs
from .model_changes import Flip, Parting, WeightChange
from .model_diff import ModelDiff
from .named_scalars import STATS, scalars, under
from .parameter_norms import ParameterNorms
from .routes import Routes
from .saved import Saved, list_of
from .soulprint import Soulprint
from .statistics import ALWAYS, COUNTS, OPTIONAL, asked_for, fields_for, fields_of, stats_of
from .surprise import Judgement, LayerSurprise, Reason, Surprise
from .tabular import Cells, Tabular
from .token_comparison import token_deltas
from .tokens import TokenDeltas
from .trace import Trace

__all__ = [
    "ALWAYS",
    "COLUMNS",
    "COUNTS",
    "OPTIONAL",
    "STATS",
    "Activations",
    "Cells",
    "Comparison",
    "Divergence",
    "Fidelity",
    "Flip",
    "Judgement",
    "LayerSurprise",
    "ModelDiff",
    "ParameterNorms",
    "Parting",
    "Reason",
    "Routes",
    "Saved",
    "Soulprint",
    "Surprise",
    "Tabular",
    "TokenDeltas",
    "Trace",
    "WeightChange",
    "allowances",
    "allowed",
    "asked_for",
    "bytes_of",
    "compare",
    "divergences",
    "effect_sizes",
    "fields_for",
    "fields_of",
    "from_known",
    "from_rows",
    "list_of",
    "load_run",
    "load_runs",
    "merged_known",
    "names_of",
    "rounding",
    "scalars",
    "stats_of",
    "to_known",
    "to_rows",
    "token_deltas",
    "under",
]
