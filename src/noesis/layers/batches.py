"""The batch of a forward: how many samples there are, and which outputs have them in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .masks import MASKS

#: Sizes, or the tensor of shape [0, *sizes] that compiled code has them from: it is compiled again for other sizes once
#: it has looked at them.
Sizes = tuple[int, ...] | Tensor


class Batch(NamedTuple):
    """What the arguments of a forward say of its batch."""

    size: int
    others: Sizes = ()  # first dimensions of arguments that have something else in front (patches, say)
    lengths: Sizes = ()  # second dimensions of those that have the samples there

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What to keep for compiled code."""
        return (self.size,), _tuple(self.others), _tuple(self.lengths)

    @classmethod
    def of_shapes(cls, size: Tensor, others: Tensor, lengths: Tensor) -> Batch:
        """A batch by tensors of shapes [0, *sizes], of which only the first is looked at before the others matter."""
        return cls(size.shape[1], others, lengths)

    def samples(self, x: Tensor) -> int:
        """How many samples an output can be told apart into; 0 when its first dimension is not of the batch.

        What follows a sample along the first dimension is its own too: windows of an image, frames, tokens. It is not
        where an argument has as many of something else in front, or a whole number of them for each (patches that are
        merged), nor where time is in front and the samples follow.
        """
        length = x.shape[0] if x.dim() else 0
        if not self.size or not length or length % self.size:
            return 0
        if self.size in (1, length):
            return self.size
        if any(other % length == 0 for other in _tuple(self.others)):
            return 0
        return 0 if x.dim() > 2 and x.shape[1] == self.size and length in _tuple(self.lengths) else self.size


def _tuple(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes.shape[1:]) if isinstance(sizes, Tensor) else sizes


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str] = ()) -> Batch:
    """The batch of a call: the first dimension that most of its tensor arguments share, 1 without any.

    A tensor of one element (a timestep) has no say unless it is alone, a padding mask has the last word. Of as many
    with each, those that come first in the signature are right. A mapping or tuple of tensors is looked into; a list of
    tensors is a batch of as many.

    Args:
        args: of the call, by position.
        kwargs: of the call, by name.
        names: of the parameters, in the order of the signature.
    """
    if len(args) == 1 and not kwargs:  # most models of layers in a row: asked at every forward
        x = args[0]
        if isinstance(x, Tensor) and x.dim() > 1 and not x.is_nested:
            size, length = x.shape[:2]
            return Batch(size, (), (length,) if length else ())
    found = _sizes(args, kwargs)
    fronts = [front for front, _, _ in found]
    size = fronts[0] if fronts else 1
    if any(front != size for front in fronts):
        size = _shared(found, names)
    return Batch(
        size,
        tuple([front for front in fronts if front != size]),
        tuple([second for front, second, _ in found if front == size and second]),
    )


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any], depth: int = 3) -> list[tuple[int, int, int | str]]:
    """The first dimension of each argument of tensors, its second (0 without one), and its position or name."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    sizes: list[tuple[int, int, int | str]] = []
    for key, value in given:
        if isinstance(value, Tensor):
            if value.dim() > 0:
                flat = value.dim() < 2 or value.is_nested  # a nested tensor has a first dimension alone
                sizes.append((value.size(0), 0 if flat else value.size(1), key))
        elif isinstance(value, list) and value and all(isinstance(element, Tensor) for element in value):
            sizes.append((len(value), 0, key))
        elif isinstance(value, (dict, tuple)) and depth > 0:
            inside = _sizes((), value, depth - 1) if isinstance(value, dict) else _sizes(value, {}, depth - 1)
            if inside and inside[0][0] > 1:
                sizes.append((*inside[0][:2], key))
    return sizes


def _shared(found: list[tuple[int, int, int | str]], names: Sequence[str]) -> int:
    """The first dimension that most of the arguments share; a padding mask has the last word."""
    named = [
        (names[key] if isinstance(key, int) and key < len(names) else str(key), front, second)
        for front, second, key in found
    ]
    for name, front, second in named:
        if name in MASKS and second and front > 1:
            return front
    ordered = [entry for name in names for entry in named if entry[0] == name]
    ordered += [entry for entry in named if entry[0] not in names]
    fronts = [front for _, front, second in ordered if front > 1 or second]  # a timestep of one element has no say
    most = max([fronts.count(front) for front in fronts])
    return next(front for front in fronts if fronts.count(front) == most)
