"""Pairs of a clean and a corrupted input: that they fit together, and some of their rows, repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadType, BadValue
from ..layers import parameters_of
from ..text import first_few
from .recording import arguments

MASK = "attention_mask"


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, by name where its forward says how its arguments are called.

    Attributes:
        args: arguments without a name.
        kwargs: the others.
        count: how many rows, the examples, they have.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int

    @classmethod
    def of(cls, given: Any, root: nn.Module, what: str) -> Inputs:
        """From a mapping of arguments, a tuple of them, or one.

        Raises:
            NoesisError: (a TypeError) when there is no tensor with a row per example; (a ValueError) for no rows.
        """
        args, kwargs = arguments(given)
        names = parameters_of(root.forward)
        if len(args) <= len(names) and not {"args", "kwargs", *kwargs} & set(names[: len(args)]):
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1]
        if not tensors:
            raise BadType(
                f"{what} is {type(given).__name__}",
                "what the model is called with: token ids [pairs, tokens], or a mapping of arguments",
                "Pass model inputs, such as tokenizer(texts, return_tensors='pt')",
            )
        count = tensors[0].shape[0]
        if not count:
            raise BadValue(f"{what} has no rows", "at least one example", "Pass some")
        return cls(args, kwargs, count)

    def tensors(self) -> dict[str, Tensor]:
        """Those with a row per example, by name or place."""
        named = {**{str(place): value for place, value in enumerate(self.args)}, **self.kwargs}
        return {name: value for name, value in named.items() if self._by_row(value)}

    def taken(self, rows: Tensor) -> Inputs:
        """Some of the rows, which may be repeated."""

        def part(value: Any) -> Any:
            return value[rows.to(value.device)] if self._by_row(value) else value

        return Inputs(tuple(map(part, self.args)), {k: part(v) for k, v in self.kwargs.items()}, len(rows))

    def with_arguments(self, more: Mapping[str, Any]) -> Inputs:
        """The same, called with more."""
        return Inputs(self.args, {**self.kwargs, **more}, self.count)

    def given(self) -> Any:
        """As `run` and `Replay` take them."""
        return self.kwargs if self.kwargs or not self.args else self.args

    def on_cpu(self) -> bool:
        """Whether they are on the CPU."""
        return all(value.device.type == "cpu" for value in self.tensors().values())

    def tokens(self) -> Tensor | None:
        """Token ids `[pairs, tokens]`, where there are some."""
        named = self.kwargs.get("decoder_input_ids", self.kwargs.get("input_ids"))
        ids = named if isinstance(named, Tensor) else next(iter(self.tensors().values()), None)
        return ids if ids is not None and ids.dim() == 2 and not ids.is_floating_point() else None

    def seen(self) -> Tensor | None:
        """Which tokens are no padding, bool `[pairs, tokens]`; None where no mask says so."""
        mask = None if "decoder_input_ids" in self.kwargs else self.kwargs.get(MASK)  # else it is not of all blocks
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _by_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.count


def paired(clean: Any, corrupted: Any, root: nn.Module) -> tuple[Inputs, Inputs]:
    """The inputs of both, which have to match row by row and token by token.

    Raises:
        NoesisError: (a ValueError) for other arguments, other shapes or other padding, with the positions at which they
            differ; (a TypeError) for no inputs.
    """
    a, b = Inputs.of(clean, root, "clean"), Inputs.of(corrupted, root, "corrupted")
    if a.kwargs.keys() != b.kwargs.keys() or len(a.args) != len(b.args):
        raise BadValue(
            f"clean has the arguments {first_few([*a.kwargs])}, and corrupted {first_few([*b.kwargs])}",
            "the same arguments",
            "Pass the same for both",
        )
    if a.count != b.count:
        raise BadValue(
            f"clean has {a.count} rows, and corrupted {b.count}", "a corrupted example for each clean one", "Pair them"
        )
    one, other = a.tokens(), b.tokens()
    if one is not None and other is not None and one.shape != other.shape:
        raise BadValue(
            f"clean prompts have {one.shape[1]} tokens and corrupted ones {other.shape[1]}; {_where(one, other)}",
            "prompts that match token by token, so that a position means the same in both",
            "Replace tokens by as many others, as a name by one of as many tokens",
        )
    _check_padding(a, b)
    for name, value in a.tensors().items():
        shape = tuple(b.tensors()[name].shape) if name in b.tensors() else None
        if shape != tuple(value.shape):
            raise BadValue(
                f"{name} has shape {tuple(value.shape)} in clean and {shape} in corrupted",
                "the same shape",
                "Pair them",
            )
    return a, b


def _check_padding(a: Inputs, b: Inputs) -> None:
    one, other = a.seen(), b.seen()
    if one is None or other is None or torch.equal(one, other):
        return
    if one.shape != other.shape:
        raise BadValue(
            f"{MASK} has shape {tuple(one.shape)} in clean and {tuple(other.shape)} in corrupted",
            "one shape",
            "Pair them",
        )
    row = int((one != other).any(1).nonzero()[0])
    places = (one[row] != other[row]).nonzero().flatten().tolist()
    raise BadValue(
        f"pair {row} has {int(one[row].sum())} tokens clean and {int(other[row].sum())} corrupted: one of them has "
        f"padding at positions {places}",
        "prompts that match token by token, so that a position means the same in both",
        "Replace tokens by as many others",
    )


def _other_shape(name: str, one: tuple[int, ...], other: tuple[int, ...] | None) -> BadValue:
    return BadValue(f"{name} has shape {one} in clean and {other} in corrupted", "the same shape", "Pair them")


def _where(one: Tensor, other: Tensor) -> str:
    """From where on rows of two lengths differ."""
    shorter = min(one.shape[1], other.shape[1])
    differ = one[:, :shorter] != other[:, :shorter].to(one.device)
    places = [int(row.nonzero()[0]) if bool(row.any()) else shorter for row in differ]
    return f"they differ from position {first_few([str(place) for place in places])} on (by pair)"
