"""A model as noesis sees it: layers, blocks, routers, denoisers, and which tensor an output means."""

from .denoisers import DENOISER, denoisers_of
from .kinds import named_layers
from .outputs import batch_of, emittable, hidden_state, is_number, measurable, part_emitted, unmeasurable
from .parts import Part, parts_of
from .routers import Router, find_routers
from .selecting import Layer, Layers, choose, select
from .streams import Place, hidden_index, stream

__all__ = [
    "DENOISER",
    "Layer",
    "Layers",
    "Part",
    "Place",
    "Router",
    "batch_of",
    "choose",
    "denoisers_of",
    "emittable",
    "find_routers",
    "hidden_index",
    "hidden_state",
    "is_number",
    "measurable",
    "named_layers",
    "part_emitted",
    "parts_of",
    "select",
    "stream",
    "unmeasurable",
]
