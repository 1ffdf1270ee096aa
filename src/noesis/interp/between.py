"""What is run between a clean and a corrupted prompt, and whether the model can tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadValue
from ..numerics import Floats
from .anatomy import called_and_root
from .effects import Direction
from .metrics import Metric
from .pairs import Inputs, paired
from .sweeping import Looking

#: Of the usual difference between clean and corrupted: more is not to be lost to rounding.
MOST_ROUNDING = 0.1


@dataclass(frozen=True)
class Between:
    """Pairs of inputs, of which one is changed towards the other.

    Attributes:
        root: the module whose dotted names count.
        base: the inputs of the run that is changed.
        source: of the run from which the changes are.
        looking: what the metric says of them.
        size: rows of a forward, at most.
    """

    root: nn.Module
    base: Inputs
    source: Inputs
    looking: Looking
    size: int

    @classmethod
    def of(
        cls,
        model: Any,
        clean: Any,
        corrupted: Any,
        metric: Metric | Callable[[Tensor], Tensor],
        direction: Direction,
        batch: int,
    ) -> Between:
        """From what a user gives, checked.

        Raises:
            NoesisError: (a ValueError) for pairs that do not match, another direction or batch, a metric of others.
        """
        if direction not in ("denoise", "noise"):
            raise BadValue(f"direction is {direction!r}", "'denoise' or 'noise'", "Pass one of them")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise BadValue(f"batch is {batch!r}", "how many rows a forward may have", "Pass a whole number from 1")
        _, root = called_and_root(model)
        one, other = paired(clean, corrupted, root)
        base, source = (other, one) if direction == "denoise" else (one, other)
        looking = Looking(metric, base, root)
        return cls(root, base, source, looking, max(batch, one.count) if looking.whole else batch)

    def few(self) -> Inputs:
        """Rows on which the model is tried."""
        return self.base.taken(torch.arange(min(2, self.base.count)))

    def taken(self, rows: Tensor) -> Between:
        """Some of the pairs."""
        return Between(self.root, self.base.taken(rows), self.source.taken(rows), self.looking.of(rows), self.size)

    def parts(self) -> list[Between]:
        """As many pairs at a time as a forward may have rows."""
        return [self.taken(rows) for rows in torch.arange(self.base.count).split(self.size)]


def check_precision(rounding: Floats, apart: Floats) -> None:
    """Check that half precision can tell clean from corrupted.

    Raises:
        NoesisError: (a ValueError) when it cannot.
    """
    lost, usual = float(np.median(rounding)), float(np.median(apart))
    if lost > MOST_ROUNDING * usual:
        raise BadValue(
            f"the model's logits are in half precision, whose rounding moves the metric by {lost:.2g}, and clean and "
            f"corrupted differ by {usual:.2g}",
            f"rounding below {MOST_ROUNDING:.0%} of the difference",
            "Patch the model in float32: model.float()",
        )
