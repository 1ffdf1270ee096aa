"""What is kept of a run of one model, so that another model can be there when it is compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..results import Activations
from .weights import Weight, digest, parts

#: What a model returns, among the names of its layers.
OUTPUT = "(output)"


class Kept(NamedTuple):
    """What is kept of a tensor: its bits as a digest, mean and std of its finite elements, and some of its elements."""

    shape: tuple[int, ...]
    dtype: str
    digest: bytes
    finite: int
    nonfinite: int
    mean: float
    std: float
    elements: Tensor

    @property
    def numel(self) -> int:
        """How many elements the tensor has."""
        return self.finite + self.nonfinite


def keep(tensor: Tensor, most: int) -> Kept:
    """Keep of a dense tensor what a comparison needs, with at most `most` of its elements, spread evenly at random.

    Examples:
        >>> import torch
        >>> from noesis.diffing.kept import keep
        >>> kept = keep(torch.arange(1000.0), 10)
        >>> kept.numel, kept.mean, len(kept.elements)
        (1000, 499.5, 10)
    """
    with torch.no_grad():
        held = tensor.detach().cpu().contiguous().reshape(-1)
        finite, mean, std = _moments(held)
        kept = held if len(held) <= most else _at(held, _places(len(held), most))
    return Kept(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        digest=digest(held),
        finite=finite,
        nonfinite=len(held) - finite,
        mean=mean,
        std=std,
        elements=kept.clone(),
    )


def _moments(flat: Tensor) -> tuple[int, float, float]:
    """How many elements of a tensor [elements] are finite, their mean and std; in two passes, part by part."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts(flat):
        finite = part[torch.isfinite(part)]
        count, total = count + len(finite), total + float(finite.sum())
    if not count:
        return 0, float("nan"), float("nan")
    mean = total / count
    for part in parts(flat):
        squares += float((part[torch.isfinite(part)] - mean).square().sum())
    return count, mean, math.sqrt(squares / count)


def _at(flat: Tensor, places: Tensor) -> Tensor:
    """Some elements; those of one byte by their bits, since not all such dtypes can be indexed."""
    return flat[places] if flat.element_size() > 1 else flat.view(torch.uint8)[places].view(flat.dtype)


@functools.lru_cache(maxsize=64)
def _places(count: int, most: int) -> Tensor:
    """One place in each of `most` equal stretches, the same ones for every tensor of that size."""
    within = torch.rand(most, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(most) + within) * (count / most)).long().clamp(max=count - 1)


class Predictions(NamedTuple):
    """The likeliest class of each token or sample, int64 [predictions], and how likely it is, float64."""

    classes: Tensor
    probabilities: Tensor


@dataclass
class Run:
    """What is kept of one model on all inputs.

    Attributes:
        calls: of each input, by layer in order of execution, its calls.
        order: of each input, layers and which of their calls it was, in order of execution.
        predictions: of each input, where its output tells a class.
        tokens: of each input, ids of what a text was made to; None for other inputs.
        unmeasured: layers whose output cannot be kept, and why.
        never_ran: layers that were selected and not called.
        class_name: of a number of a class.
        weights: by name; None where the model is not there.
        weights_left_out: weights that cannot be compared, and why.
        meta: what is known of the model.
    """

    calls: list[dict[str, list[Kept]]] = field(default_factory=list)
    order: list[list[tuple[str, int]]] = field(default_factory=list)
    predictions: list[Predictions | None] = field(default_factory=list)
    tokens: list[list[int] | None] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)
    never_ran: list[str] = field(default_factory=list)
    class_name: Callable[[int], str] = str
    weights: dict[str, Weight] | None = None
    weights_left_out: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Those that ran, in order of execution."""
        return list(dict.fromkeys(name for calls in self.calls for name in calls))


def of_captures(captures: Sequence[Activations], most: int) -> Run:
    """What is kept of saved captures, each of one input.

    The order of execution is that in which the layers stand, call by call.
    """
    run = Run(meta=dict(captures[0].meta))
    for acts in captures:
        calls = {name: [keep(tensor, most) for tensor in tensors] for name, tensors in acts.items() if tensors}
        longest = max(map(len, calls.values()), default=0)
        run.calls.append(calls)
        run.order.append([(name, call) for call in range(longest) for name in calls if call < len(calls[name])])
        run.predictions.append(None)
        run.tokens.append(None)
        run.unmeasured |= acts.unmeasured
    run.never_ran = [name for name in captures[0].never_ran if name not in run.layers]
    return run
