"""Full activations of a few runs, kept on the CPU within a memory bound.

Unlike `wrap`, which keeps statistics, this keeps the tensors themselves, for `noesis.token_deltas`, probes and plots.
It copies to the host at every layer, so it is for a few runs, not for production.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import BadType, BadValue, TooLarge, WrongState
from ..internals import recomputing
from ..layers import Layer, Layers, choose, hidden_index, hidden_state, stream
from ..results import Activations, bytes_of
from ..text import counted
from .wrap_model import resolve


@contextmanager
def capture(model: Any, layers: Layers = "blocks", *, max_bytes: int = 1 << 30) -> Iterator[Activations]:
    """Keep the full activations of the runs inside the `with` block, on the CPU.

    Outputs and gradients are bitwise what they are without it, with one exception: `nn.TransformerEncoderLayer`
    leaves its fused inference path while any hook is attached, which may round differently on a GPU.
    A layer that runs several times keeps every call; the recomputation of activation checkpointing is not a call.
    Compile the model after entering (graphs break at each layer, so not with `fullgraph=True`), or not at all:
    layers of a model that ran compiled before are not seen.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import capture
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> with capture(model, "all") as acts:
        ...     _ = model(torch.ones(2, 4))
        >>> acts
        Activations of 2 layers, 2 calls, 128 bytes
        layer  calls    dtype
        0        2x8  float32
        1        2x8  float32

    Args:
        model: an `nn.Module`, a diffusers pipeline, or the result of `noesis.wrap`.
        layers: which layers, as in `noesis.wrap`.
        max_bytes: the most bytes of activations to hold.

    Yields:
        The `Activations`, filling while the model runs.

    Raises:
        NoesisError: (a MemoryError) when the next tensor would pass `max_bytes`; (a RuntimeError) on leaving,
            when no selected layer ran; (a ValueError or TypeError) when nothing is selected or no output can be kept.
    """
    _, root, _, _ = resolve(model)
    chosen = choose(root, layers)
    meta = {"model": type(root).__name__, "torch_version": torch.__version__}
    acts = Activations({layer.name: [] for layer in chosen}, meta=meta)
    recording = Keeping(acts, max_bytes)
    with each_output(chosen, recording.keep):
        yield acts
    _check(acts)
    logger.debug("captured {} bytes of {} layers, {} never ran", acts.nbytes, len(acts), len(acts.never_ran))


@contextmanager
def each_output(chosen: Sequence[Layer], keep: Callable[[str, Tensor | None], None]) -> Iterator[None]:
    """Hand on what layers return while the block lasts: the name of the layer, and its hidden state if it has one.

    Examples:
        >>> import torch
        >>> from noesis.layers import choose
        >>> from noesis.wrapping import each_output
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> with each_output(choose(model, "all"), lambda name, hidden: print(name, tuple(hidden.shape))):
        ...     _ = model(torch.ones(2, 4))
        0 (2, 8)
        1 (2, 8)

    Args:
        chosen: layers of one model.
        keep: called in the order in which layers end.
    """
    # Removing a hook does not reach a deep copy of the module, nor a graph that was compiled with it.
    still = [True]
    handles: list[Any] = []
    try:
        handles.extend(layer.module.register_forward_hook(_hook(layer, keep, still)) for layer in chosen)
        yield
    finally:
        still.clear()
        for handle in handles:
            handle.remove()


def _hook(
    layer: Layer, keep: Callable[[str, Tensor | None], None], still: list[bool]
) -> Callable[[nn.Module, Any, Any], None]:
    name, place, index = layer.name, layer.place, hidden_index(layer.module)

    def hand_on(_module: nn.Module, _args: Any, output: Any) -> None:
        # Inside a backward pass, a forward is the recomputation of activation checkpointing.
        if still and not recomputing():
            keep(name, hidden_state(output, index) if place is None else stream(output, place))

    # Traced, lists that grow in `keep` would recompile at every step.
    disable: Callable[..., Callable[[nn.Module, Any, Any], None]] = torch.compiler.disable
    return disable(hand_on)


class Keeping:
    """Copies tensors to the CPU, within a bound.

    Examples:
        >>> import torch
        >>> from noesis import Activations
        >>> from noesis.wrapping import Keeping
        >>> keeping = Keeping(Activations({"block": []}), max_bytes=1 << 20)
        >>> keeping.keep("block", torch.ones(2, 4))
        >>> keeping.held
        32

    Args:
        acts: where they go.
        max_bytes: the most bytes to hold.

    Raises:
        NoesisError: (a ValueError or TypeError) for a bound that is none.
    """

    def __init__(self, acts: Activations, max_bytes: int) -> None:
        self.acts, self.bound, self.held = acts, _positive(max_bytes), 0

    def keep(self, name: str, hidden: Tensor | None) -> None:
        """Keep a copy under a name.

        Raises:
            NoesisError: (a MemoryError) when it would pass the bound.
        """
        if hidden is None:
            self.acts.unmeasured[name] = "no floating tensor in its output"
            return
        if hidden.layout != torch.strided or hidden.is_nested or hidden.is_meta:
            self.acts.unmeasured[name] = "its tensor is sparse, nested or without data"
            return
        needed = bytes_of(hidden)
        if self.held + needed > self.bound:
            raise TooLarge(
                f"Keeping {needed} bytes of layer {name!r} would pass max_bytes={self.bound}: {self.held} are held",
                f"at most {self.bound} bytes of activations",
                "Select fewer layers, run a shorter input, or pass a larger max_bytes",
            )
        hidden = hidden.detach()
        if torch.is_inference_mode_enabled():  # out of it, so that what is kept can be trained on later
            with torch.inference_mode(False), torch.no_grad():
                kept = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu").copy_(hidden)
        else:
            kept = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu").copy_(hidden)
        self.acts[name].append(kept)
        self.held += needed


def _positive(max_bytes: Any) -> int:
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
        raise BadType(f"max_bytes is {max_bytes!r}", "a whole number of bytes", "Pass for example 1 << 30")
    if max_bytes <= 0:
        raise BadValue(f"max_bytes is {max_bytes}", "a positive number of bytes", "Pass for example 1 << 30")
    return max_bytes


def _check(acts: Activations) -> None:
    if len(acts.never_ran) == len(acts):
        raise WrongState(
            f"None of the {counted(len(acts), 'selected layer')} ran inside the with block",
            "a forward of the model while capturing",
            "Run the model inside the block; if it did run, it was compiled before: enter capture before the first run "
            "of a torch.compile'd model, or capture the uncompiled one",
        )
    if not any(acts.values()):
        raise BadValue(
            f"No output of the selected layers can be kept: {', '.join(itertools.islice(acts.unmeasured, 8))}",
            "layers that return a dense floating tensor",
            "Select other layers",
        )
