"""A model as noesis sees it: layers, blocks, routers, denoisers, and which tensor an output means."""

from .batches import Batch, batch_of
from .denoisers import DENOISER, denoisers_of
from .kinds import is_attention, is_conv, is_leaf, is_linear, named_layers
from .masks import MaskArgument, counting, has_positions, is_flat, mask_arguments, mask_within, parameters_of
from .outputs import emittable, hidden_state, is_number, measurable, part_emitted, unmeasurable
from .parts import Part, parts_of
from .routers import Router, find_routers
from .selecting import Layer, Layers, choose, select
from .streams import Place, hidden_index, stream

__all__ = [
    "DENOISER",
    "Batch",
    "Layer",
    "Layers",
    "MaskArgument",
    "Part",
    "Place",
    "Router",
    "batch_of",
    "choose",
    "counting",
    "denoisers_of",
    "emittable",
    "find_routers",
    "has_positions",
    "hidden_index",
    "hidden_state",
    "is_attention",
    "is_conv",
    "is_flat",
    "is_leaf",
    "is_linear",
    "is_number",
    "mask_arguments",
    "mask_within",
    "measurable",
    "named_layers",
    "parameters_of",
    "part_emitted",
    "parts_of",
    "select",
    "stream",
    "unmeasurable",
]
