"""Which forward of a generation runs: what `steps` of an edit counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .edits import DECODE, PREFILL


class Clock:
    """Counts the forwards of a model: from 0 where a generation begins, or without one, where the `with` block does.

    A generation begins with `generate`, with the call of a pipeline, or with a forward that is given no keys of
    earlier tokens by a model that could have them.
    """

    def __init__(self) -> None:
        self.step = -1
        self.depth = 0  # of models in each other
        self.generating = 0
        self._on_device: Tensor | None = None  # the same for compiled code, to which numbers would be constants

    def ticks_on(self, device: torch.device) -> None:
        """Count on a device, too."""
        with torch.inference_mode(False):
            self._on_device = torch.full((), -1, dtype=torch.int64, device=device)

    def restart(self) -> None:
        """The next forward is the first one."""
        self.step = -1
        if self._on_device is not None:
            self._on_device.fill_(-1)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """All forwards inside are of one generation; one inside of another is none of its own."""
        if not self.generating:
            self.restart()
        self.generating += 1
        try:
            yield
        finally:
            self.generating -= 1

    def tick(self, kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        first = not self.generating and _is_first(kwargs)
        if isinstance(first, Tensor):  # of a static cache, whose length is on the device
            first = first.all() if self._on_device is not None or is_dynamo_compiling() else bool(first.all())
        if not is_dynamo_compiling():
            self.step = 0 if first else self.step + 1
        if self._on_device is not None:
            if isinstance(first, Tensor):
                self._on_device.copy_(torch.where(first, 0, self._on_device + 1))
            elif first:
                self._on_device.zero_()
            else:
                self._on_device.add_(1)

    def reached(self, steps: Any) -> bool | Tensor:
        """Whether the forward that runs is one of `steps`; on the device in compiled code."""
        if steps is None:
            return True
        if is_dynamo_compiling():
            assert self._on_device is not None
            step = self._on_device
            if steps in (PREFILL, DECODE):
                return step < 1 if steps == PREFILL else step >= 1
            return torch.stack([step == number for number in steps]).any()
        if steps in (PREFILL, DECODE):
            return self.step < 1 if steps == PREFILL else self.step >= 1
        return self.step in steps


def _is_first(kwargs: dict[str, Any]) -> Any:
    """Whether a forward begins something new: one with a cache of keys that is empty, or could have one and has not."""
    if "past_key_values" not in kwargs:
        return False
    past = kwargs["past_key_values"]
    length = getattr(past, "get_seq_length", None)
    return past is None or (callable(length) and length() == 0)
