"""Full activations of a few runs, on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .. import files
from .._version import __version__
from ..errors import BadFile, BadValue
from ..text import counted, plain, table
from .saved import list_of
from .tabular import Cells, Tabular

KIND = "activations"


class UnknownLayerError(BadValue, KeyError):
    """A layer name that is not among the captured ones."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class Activations(Mapping[str, list[Tensor]], Tabular):
    """What `capture` kept: layer name -> the layer's hidden states, one tensor per call, in order.

    Tensors lie on the CPU, contiguous, in the dtype the layer computed. A layer that was selected and
    never ran has an empty list and is in `never_ran`; one whose output holds no dense floating tensor
    is in `unmeasured`.

    As a table (`to_csv`, `to_dataframe`) it has a row per layer and call, with shapes and sizes, not the numbers.

    Examples:
        >>> import torch
        >>> from noesis import Activations
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
        return sum(bytes_of(tensor) for tensors in self._calls.values() for tensor in tensors)

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
            **files.heading(KIND),
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
            layers, counts = list_of(str, header["layers"]), list_of(int, header["calls"])
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

    def _columns(self) -> dict[str, Cells]:
        found = [(name, call, tensor) for name, calls in self._calls.items() for call, tensor in enumerate(calls)]
        return {
            "layer": [name for name, _, _ in found],
            "call": [call for _, call, _ in found],
            "shape": [_shape(tensor) for _, _, tensor in found],
            "dtype": [_dtype(tensor) for _, _, tensor in found],
            "elements": [tensor.numel() for _, _, tensor in found],
            "bytes": [bytes_of(tensor) for _, _, tensor in found],
        }

    def __repr__(self) -> str:
        count = sum(len(calls) for calls in self._calls.values())
        head = f"Activations of {counted(len(self), 'layer')}, {counted(count, 'call')}, {_size(self.nbytes)}"
        rows = [[name, _shapes(calls), _dtypes(calls)] for name, calls in self._calls.items() if calls]
        lines = [head, *([table(["layer", "calls", "dtype"], rows)] if rows else [])]
        if self.never_ran:
            lines.append(f"never ran: {', '.join(map(plain, self.never_ran))}")
        lines += [f"not measured: {plain(name)} ({plain(str(why))})" for name, why in self.unmeasured.items()]
        return "\n".join(lines)


def _read(path: files.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = files.read_bytes(path)
    with files.reading_tensors(path, f"{KIND} file"):
        header = files.read_header(data, path)
        tensors = safetensors.torch.load(data)  # checks that sizes and offsets fit the file
    return tensors, files.check_header(header, KIND, path)


def bytes_of(tensor: Tensor) -> int:
    """Memory that its elements take."""
    return tensor.numel() * tensor.element_size()


def _shapes(calls: Sequence[Tensor]) -> str:
    """Shapes in order, repeats counted: '1x19x64, 4 of 1x1x64'."""
    groups = [(shape, len(list(group))) for shape, group in itertools.groupby(map(_shape, calls))]
    shown = [text if count == 1 else f"{count} of {text}" for text, count in groups[:4]]
    return ", ".join(shown + ["..."] * (len(groups) > 4))


def _dtypes(calls: Sequence[Tensor]) -> str:
    return ", ".join(dict.fromkeys(map(_dtype, calls)))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
