"""Names of torch and other libraries that are private, undocumented or differ between versions, each in one place.

A name is looked up once, when this package loads. One that is missing, or is not what noesis knows, is said in the log,
and what stands in its place is public and slower, never an exception in a forward and never a row lost in silence.
What has to hold for a name is checked where it is looked up; `tests/internals` takes each away in turn.
"""

from .attention import Attend, around_attention
from .attention_functions import SOFTMAX, TORCH_SDPA, AttentionFunctions, Unfused, fusing
from .autograd import node_count, node_number, picklable_hook, recomputing
from .calls import CALL, CALL_IMPL, called_as_any
from .compiling import (
    LISTENERS,
    compiled,
    drop_kept,
    foreign,
    inside,
    keep,
    kept,
    rebind,
    set_sizes,
    sizes_of,
    stays,
    times_traced,
    traced_for_export,
)
from .cuda import current_device, raw_stream
from .frames import inlined, passed_over, untraced
from .libraries import capture_declarations, declared_streams, device_kinds, register_block, rendezvous
from .modes import call_undisturbed, disturbed, undisturbed
from .tensors import local_part, norms_of, storageless, traced_by_fx, traced_by_jit

__all__ = [
    "CALL",
    "CALL_IMPL",
    "LISTENERS",
    "SOFTMAX",
    "TORCH_SDPA",
    "Attend",
    "AttentionFunctions",
    "Unfused",
    "around_attention",
    "call_undisturbed",
    "called_as_any",
    "capture_declarations",
    "compiled",
    "current_device",
    "declared_streams",
    "device_kinds",
    "disturbed",
    "drop_kept",
    "foreign",
    "fusing",
    "inlined",
    "inside",
    "keep",
    "kept",
    "local_part",
    "node_count",
    "node_number",
    "norms_of",
    "passed_over",
    "picklable_hook",
    "raw_stream",
    "rebind",
    "recomputing",
    "register_block",
    "rendezvous",
    "set_sizes",
    "sizes_of",
    "stays",
    "storageless",
    "times_traced",
    "traced_by_fx",
    "traced_by_jit",
    "traced_for_export",
    "undisturbed",
    "untraced",
]
