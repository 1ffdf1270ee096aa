"""What is normal: codebooks, calibration, scores, drift."""

from ..results import Judgement, LayerSurprise, Reason
from .calibration import DEPENDS, MASKED, UNTOUCHED, Calibration
from .calibration_file import (
    load_calibration,
    pack_codes,
    read_calibration,
    save_calibration,
    unpack_codes,
    written_calibration,
)
from .codebook import Codebook
from .collection import Collection, Store
from .drift import DriftMonitor
from .layer_codebook import LayerCodebook
from .nervecode import Ambiguity, SoftCode
from .scorer import Scorer
from .vectors import Collected, Kept

__all__ = [
    "DEPENDS",
    "MASKED",
    "UNTOUCHED",
    "Ambiguity",
    "Calibration",
    "Codebook",
    "Collected",
    "Collection",
    "DriftMonitor",
    "Judgement",
    "Kept",
    "LayerCodebook",
    "LayerSurprise",
    "Reason",
    "Scorer",
    "SoftCode",
    "Store",
    "load_calibration",
    "pack_codes",
    "read_calibration",
    "save_calibration",
    "unpack_codes",
    "written_calibration",
]
