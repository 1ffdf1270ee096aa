"""Full activations of a few runs, kept on the CPU within a memory bound.

Unlike `wrap`, which keeps statistics, this keeps the tensors themselves, for `noesis.token_deltas`, probes and plots.
It copies to the host at every layer, so it is for a few runs, not for production.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from loguru import logger
from torch import Tensor, nn

from .. import files
from .._version import __version__
from ..errors import BadFile, BadType, BadValue, TooLarge, WrongState
from ..internals.autograd import recomputing
from ..internals.libraries import stream_index
from ..layers.outputs import hidden_state
from ..layers.selecting import Layers, select
from ..text import counted, plain, table
from .wrap import resolve

KIND = "activations"
T = TypeVar("T", str, int)


class UnknownLayerError(BadValue, KeyError):
    """A layer name that is not among the captured ones."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class Activations(Mapping[str, list[Tensor]]):
    """What `capture` kept: layer name -> the layer's hidden states, one tensor per call, in order.

    Tensors lie on the CPU, contiguous, in the dtype the layer computed. A layer that was selected and
    never ran has an empty list and is in `never_ran`; one whose output holds no dense floating tensor
    is in `unmeasured`.

    Example:
        >>> import torch
        >>> from noesis.wrapping.capture import Activations
        >>> acts = Activations({"block": [torch.ones(1, 3, 4), torch.ones(1, 1, 4)]})
        >>> acts
        Activations of 1 layer, 2 calls, 64 bytes
        layer         calls    dtype
        block  1x3x4, 1x1x4  float32
        >>> acts.stacked("block").shape
        torch.Size([1, 4, 4])

    Args:
        calls: layer name -> tensors `[...]`, one per call.
        unmeasured: layers that ran with an output that cannot be kept, and why.
        meta: what to remember about the run; goes into the file.
    """

    def __init__(
        self,
        calls: Mapping[str, Sequence[Tensor]],
        *,
        unmeasured: Mapping[str, str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._calls = {name: list(tensors) for name, tensors in calls.items()}
        self.unmeasured: dict[str, str] = dict(unmeasured or {})
        self.meta: dict[str, Any] = dict(meta or {})

    def __getitem__(self, name: str) -> list[Tensor]:
        try:
            return self._calls[name]
        except (KeyError, TypeError):
            raise UnknownLayerError(
                f"layer {name!r} was not captured",
                f"one of {', '.join(map(repr, itertools.islice(self._calls, 8)))}{', ...' if len(self) > 8 else ''}",
                "Look at .layers",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    # Tensors have no single truth value, so a Mapping's own equality could only raise.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def layers(self) -> list[str]:
        """The selected layers by their dotted names, in the order of `named_modules()`."""
        return list(self._calls)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(_nbytes(tensor) for tensors in self._calls.values() for tensor in tensors)

    @property
    def never_ran(self) -> list[str]:
        """The selected layers that were not called."""
        return [name for name, tensors in self._calls.items() if not tensors and name not in self.unmeasured]

    def stacked(self, name: str) -> Tensor:
        """All calls of a layer, joined along the token dimension: prefill, then each decoded token.

        Args:
            name: a layer whose calls are `[batch, tokens, width]`, equal but for the tokens.

        Returns:
            A tensor `[batch, sum of tokens, width]` in the layer's dtype.

        Raises:
            NoesisError: (a ValueError) when the layer never ran or its calls do not fit together.
        """
        calls = self[name]
        if not calls:
            raise BadValue(
                f"layer {name!r} holds no activations", "a layer that ran", "Layers without are in .never_ran"
            )
        first = calls[0]
        fits = (
            tensor.dim() == 3
            and tensor.shape[0] == first.shape[0]
            and tensor.shape[2] == first.shape[2]
            and tensor.dtype == first.dtype
            for tensor in calls
        )
        if not all(fits):
            raise BadValue(
                f"the calls of layer {name!r} have shapes {_shapes(calls)} ({_dtypes(calls)})",
                "calls of shape [batch, tokens, width] with one batch size, width and dtype",
                f"Use acts[{name!r}], the list of single calls, or capture other layers",
            )
        return torch.cat(calls, dim=1)

    def save(self, path: files.PathLike) -> Path:
        """Write a `.safetensors` file: a tensor `<layer>/<call>` per call, in its own dtype, and a JSON header."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise files.unknown_suffix(path, ".safetensors")
        tensors = {
            f"{name}/{call}": tensor.detach().cpu().contiguous()
            for name, calls in self._calls.items()
            for call, tensor in enumerate(calls)
        }
        header = {
            "format": f"noesis.{KIND}",
            "format_version": files.FORMAT_VERSION,
            "noesis": __version__,
            "torch": torch.__version__,
            "layers": self.layers,
            "calls": [len(calls) for calls in self._calls.values()],
            "unmeasured": self.unmeasured,
            "meta": self.meta,
        }
        # numpy knows neither bfloat16 nor float8, so not by way of files.save_tensors.
        return files.write_bytes(path, safetensors.torch.save(tensors, {"noesis": files.dump_json(header)}))

    @classmethod
    def load(cls, path: files.PathLike) -> Activations:
        """Read back what `save` wrote.

        Raises:
            NoesisError: (a ValueError) for a broken file, another format or version; (a FileNotFoundError) for none.
        """
        tensors, header = _read(path)
        try:
            layers, counts = _list_of(str, header["layers"]), _list_of(int, header["calls"])
            unmeasured, meta = dict(header["unmeasured"]), dict(header["meta"])
            kept = {
                name: [tensors.pop(f"{name}/{call}") for call in range(count)]
                for name, count in zip(layers, counts, strict=True)
            }
            if tensors:
                raise ValueError(f"{len(tensors)} tensors more than listed")
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(
                f"{path} does not hold the tensors its header lists ({type(error).__name__}: {error})",
                "one tensor '<layer>/<call>' per layer and call",
                "Write it again with Activations.save",
            ) from None
        return cls(kept, unmeasured=unmeasured, meta=meta)

    def __repr__(self) -> str:
        count = sum(len(calls) for calls in self._calls.values())
        head = f"Activations of {counted(len(self), 'layer')}, {counted(count, 'call')}, {_size(self.nbytes)}"
        rows = [[name, _shapes(calls), _dtypes(calls)] for name, calls in self._calls.items() if calls]
        lines = [head, *([table(["layer", "calls", "dtype"], rows)] if rows else [])]
        if self.never_ran:
            lines.append(f"never ran: {', '.join(map(plain, self.never_ran))}")
        lines += [f"not measured: {plain(name)} ({plain(str(why))})" for name, why in self.unmeasured.items()]
        return "\n".join(lines)


@contextmanager
def capture(model: Any, layers: Layers = "blocks", *, max_bytes: int = 1 << 30) -> Iterator[Activations]:
    """Keep the full activations of the runs inside the `with` block, on the CPU.

    Outputs and gradients are bitwise what they are without it, with one exception: `nn.TransformerEncoderLayer`
    leaves its fused inference path while any hook is attached, which may round differently on a GPU.
    A layer that runs several times keeps every call; the recomputation of activation checkpointing is not a call.
    Compile the model after entering (graphs break at each layer, so not with `fullgraph=True`), or not at all:
    layers of a model that ran compiled before are not seen.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from noesis.wrapping.capture import capture
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
    bound = _positive(max_bytes)
    chosen = select(root, layers)
    acts = Activations({name: [] for name, _ in chosen}, meta={"model": type(root).__name__})
    recording = _Recording(acts, bound)
    handles: list[Any] = []
    try:
        for name, module in chosen:
            handles.append(module.register_forward_hook(recording.hook(name, stream_index(module))))
        yield acts
    finally:
        recording.open = False
        for handle in handles:
            handle.remove()
    _check(acts)
    logger.debug("captured {} bytes of {} layers, {} never ran", acts.nbytes, len(acts), len(acts.never_ran))


class _Recording:
    """Where the hooks of one capture put what they see."""

    def __init__(self, acts: Activations, bound: int) -> None:
        self.acts, self.bound, self.held = acts, bound, 0
        # Removing a hook does not reach a deep copy of the module, nor a graph that was compiled with it.
        self.open = True

    def hook(self, name: str, index: int | None) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # Inside a backward pass, a forward is the recomputation of activation checkpointing.
            if self.open and not recomputing():
                self.keep(name, hidden_state(output, index))

        # Traced, the growing lists would recompile at every step.
        disable: Callable[..., Callable[[nn.Module, Any, Any], None]] = torch.compiler.disable
        return disable(keep)

    def keep(self, name: str, hidden: Tensor | None) -> None:
        if hidden is None:
            self.acts.unmeasured[name] = "no floating tensor in its output"
            return
        if hidden.layout != torch.strided or hidden.is_nested or hidden.is_meta:
            self.acts.unmeasured[name] = "its tensor is sparse, nested or without data"
            return
        needed = _nbytes(hidden)
        if self.held + needed > self.bound:
            raise TooLarge(
                f"Keeping {needed} bytes of layer {name!r} would pass max_bytes={self.bound}: {self.held} are held",
                f"at most {self.bound} bytes of activations",
                "Select fewer layers, run a shorter input, or pass a larger max_bytes",
            )
        # Out of inference mode, so that what is kept can be trained on later.
        with torch.inference_mode(False), torch.no_grad():
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


def _read(path: files.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = files.read_bytes(path)
    with files.reading_tensors(path, f"{KIND} file"):
        header = files.read_header(data, path)
        tensors = safetensors.torch.load(data)  # checks that sizes and offsets fit the file
    return tensors, files.check_header(header, KIND, path)


def _list_of(kind: type[T], values: Any) -> list[T]:
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise TypeError(f"expected a list of {kind.__name__}")
    return values


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shapes(calls: Sequence[Tensor]) -> str:
    """Shapes in order, repeats counted: '1x19x64, 4 of 1x1x64'."""
    groups = [
        ("x".join(map(str, shape)) or "scalar", len(list(group)))
        for shape, group in itertools.groupby(tuple(tensor.shape) for tensor in calls)
    ]
    shown = [text if count == 1 else f"{count} of {text}" for text, count in groups[:4]]
    return ", ".join(shown + ["..."] * (len(groups) > 4))


def _dtypes(calls: Sequence[Tensor]) -> str:
    return ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in calls))


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
