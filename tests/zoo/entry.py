"""What the zoo knows of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Positional or keyword arguments of a forward.
Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo, with an example input and what `layers="blocks"` is to find in it.

    Attributes:
        name: family of the architecture.
        kind: what it is, for the table.
        build: makes the model; the weights are random.
        inputs: makes the arguments of a forward, always the same ones, for two samples or more.
        blocks: names of the blocks with N for a number, and how many there are.
        logits: from the model's output to logits [N, classes] or [N, tokens, classes]; None where there are none.
        differentiable: whether the bare model has gradients in eval mode too.
        coded: whether its blocks have the samples in front, which codebooks need.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    blocks: dict[str, int] = field(default_factory=dict)
    logits: Callable[[Any], Any] | None = None
    differentiable: bool = True
    coded: bool = True


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same ones for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int = 2, length: int = 7, below: int = 50, seed: int = 0) -> Tensor:
    """Token ids [rows, length] without special tokens."""
    return torch.randint(3, below, (rows, length), generator=torch.Generator().manual_seed(seed))


def call(model: Any, inputs: Inputs) -> Any:
    """Run a model on inputs of the zoo."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
