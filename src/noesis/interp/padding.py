"""Which positions of a batch count, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import counting, mask_arguments


def counted_positions(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int, tokens: int
) -> Tensor | None:
    """Which tokens are no padding by the mask that the model is given, bool `[batch, tokens]`; None without one.

    Of a mask that counts tokens of a cache too, the newest are meant.
    """
    for argument in mask_arguments(root.forward, "attention_mask"):
        mask = argument.given(args, dict(kwargs))
        if not isinstance(mask, Tensor) or argument.of or mask.dim() < 2:
            continue
        counts = counting(mask, argument.marks_padding).bool()
        if counts.shape[0] == batch and counts.shape[1] >= tokens:
            return counts[:, counts.shape[1] - tokens :]
        return None
    return None
