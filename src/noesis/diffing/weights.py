"""Weights of two models of which one may be freed before the other is there."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..results import WeightChange

#: Elements up to which a weight is kept as it is.
WHOLE = 1 << 14
#: Buckets of a sketch: a prime, so that no row or column of a weight falls into few of them.
BUCKETS = 4093
#: Elements that are looked at together, and signs of a sketch, which repeat after these.
PERIOD = 1 << 20
#: What adapters and data parallelism put in front of names, and in the middle.
_AROUND = re.compile(r"^(?:base_model\.model\.|module\.)+|\.base_layer(?=\.|$)")


class Weight(NamedTuple):
    """What is kept of a weight.

    Attributes:
        shape: its own.
        dtype: its name.
        digest: of its bits.
        norm: Euclidean.
        values: the weight itself, where its model stays or it is small.
        sketch: float64 [BUCKETS] of its elements with random signs, whose difference is about as long as theirs
            (Charikar, Chen & Farach-Colton 2002, "Finding frequent items in data streams").
    """

    shape: tuple[int, ...]
    dtype: str
    digest: bytes
    norm: float
    values: Tensor | None
    sketch: Tensor | None


def without_adapters(name: str) -> str:
    """A name as it is in the model that an adapter or a data-parallel module was put around.

    Examples:
        >>> from noesis.diffing.weights import without_adapters
        >>> without_adapters("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return _AROUND.sub("", name)


def weights_of(root: nn.Module, stays: bool) -> tuple[dict[str, Weight], dict[str, str]]:
    """What is kept of a model's parameters and buffers, and which cannot be compared, and why.

    A layer with adapters counts with the weight that it computes with; quantised weights count dequantised. Of a
    tensor with several names all are there.

    Args:
        root: the model.
        stays: whether it is still there, unchanged, when these are compared.
    """
    found: dict[str, Weight] = {}
    left_out: dict[str, str] = {}
    known: dict[int, Weight] = {}  # by the id of a tensor that a module holds, which no other can have meanwhile
    for path, module in root.named_modules():
        for own, tensor, held in _own(module):
            name = without_adapters(f"{path}.{own}" if path else own)
            if name in found or name in left_out:  # the weight of a layer that has adapters around it
                continue
            if why := _why_not(tensor):
                left_out[name] = why
                continue
            weight = known.get(id(tensor)) if held else None
            found[name] = weight or _kept(_dense(tensor), stays)
            if held:
                known[id(tensor)] = found[name]
    return found, left_out


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The tensors of one module by name, and whether it holds them: others are made here."""
    weight = getattr(module, "weight", None)
    if callable(weight) and not isinstance(weight, nn.Module):  # quantised by torch.ao: packed, no parameters
        made = ((name, getattr(module, name)()) for name in ("weight", "bias"))
        yield from ((name, value, False) for name, value in made if isinstance(value, Tensor))
        return
    if callable(getattr(module, "get_delta_weight", None)) and not getattr(module, "disable_adapters", False):
        weight = _adapted(module)
        if weight is not None:
            yield "weight", weight, False
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, tensor, True


def _why_not(tensor: Tensor) -> str:
    """Why a tensor cannot be held against another as numbers; empty where it can."""
    kind = type(tensor)
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return "it has no data"
    if tensor.is_quantized or _dequantises(kind):
        return ""
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"it is a {kind.__name__}, which computes in its own way"
    if kind not in (Tensor, nn.Parameter) and not tensor.is_floating_point():
        return f"it is a {kind.__name__}, whose numbers stand for others"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_complex():
        return "it is sparse, nested or complex"
    return ""


def _adapted(module: Any) -> Tensor | None:
    """The weight that a layer of PEFT computes with; None where it has no adapter of its own."""
    base = module.get_base_layer().weight
    if module.merged or base.is_quantized or not base.is_floating_point():
        return None
    with torch.no_grad():
        deltas = [module.get_delta_weight(name) for name in module.active_adapters if name in module.scaling]
        made: Tensor | None = sum(deltas, base.detach()) if deltas else None
    return made


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized or _dequantises(type(tensor)) else tensor


def _dequantises(kind: type[Tensor]) -> bool:
    """Whether tensors of a class are quantised, and can be made what they stand for."""
    return kind.dequantize is not Tensor.dequantize


def _kept(tensor: Tensor, stays: bool) -> Weight:
    with torch.no_grad():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        small = len(flat) <= WHOLE
        return Weight(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            digest(flat),
            math.sqrt(sum(float(part.square().sum()) for part in parts(flat))),
            tensor.detach() if stays else flat.clone() if small else None,
            None if stays or small else _sketch(flat),
        )


def digest(flat: Tensor) -> bytes:
    """Of the bits of a tensor [elements] on the CPU: equal for equal bits alone."""
    data: Any = flat.view(torch.uint8).numpy()  # a buffer, which its type does not tell
    return hashlib.blake2b(data, digest_size=16).digest()


def parts(flat: Tensor) -> Iterator[Tensor]:
    """A tensor [elements] in float64 on the CPU, part by part."""
    return (part.to("cpu", torch.float64) for part in flat.split(PERIOD))


def _sketch(flat: Tensor) -> Tensor:
    signs = torch.randint(0, 2, (PERIOD,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    total = torch.zeros(BUCKETS, dtype=torch.float64)
    for number, part in enumerate(parts(flat)):
        buckets = (torch.arange(len(part)) + number * PERIOD) % BUCKETS
        total.index_add_(0, buckets, part * signs[: len(part)])
    return total


def change(name: str, a: Weight, b: Weight) -> WeightChange | str | None:
    """How a weight differs; None where it does not; or why that cannot be said."""
    if a.shape != b.shape:
        return f"shape {_shape(a.shape)} in a and {_shape(b.shape)} in b"
    if _is_float(a.dtype) != _is_float(b.dtype):
        return f"{a.dtype} in a and {b.dtype} in b"
    if a.digest == b.digest and a.dtype == b.dtype:
        return None
    if a.values is not None and b.values is not None:
        both = zip(*(parts(each.reshape(-1)) for each in (a.values, b.values)), strict=True)
        norm, estimated = math.sqrt(sum(float((y - x).square().sum()) for x, y in both)), False
    else:
        x, y = (_sketched(each) for each in (a, b))
        norm, estimated = float(torch.linalg.vector_norm(y - x)), True
    if norm == 0 and a.dtype != b.dtype:
        return None  # the same numbers
    relative = norm / a.norm if a.norm else float("inf") if norm else 0.0
    return WeightChange(name, norm, relative, estimated)


def _sketched(weight: Weight) -> Tensor:
    if weight.sketch is not None:
        return weight.sketch
    assert weight.values is not None
    return _sketch(weight.values.reshape(-1))


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
