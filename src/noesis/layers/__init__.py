"""A model as noesis sees it: layers, blocks, routers, denoisers, and which tensor an output means."""

from .denoisers import DENOISER, denoisers_of
from .kinds import named_layers
from .outputs import batch_of, emittable, hidden_state, is_dtensor, is_number, part_emitted, part_of, unmeasurable
from .parts import Part, parts_of
from .routers import Router, find_routers
from .selecting import Layers, select

__all__ = [
    "DENOISER",
    "Layers",
    "Part",
    "Router",
    "batch_of",
    "denoisers_of",
    "emittable",
    "find_routers",
    "hidden_state",
    "is_dtensor",
    "is_number",
    "named_layers",
    "part_emitted",
    "part_of",
    "parts_of",
    "select",
    "unmeasurable",
]
