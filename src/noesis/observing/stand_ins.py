"""Parts of a model that are called in its place, and which of their calls begin a step.

PEFT and BLIP-2 generate with an inner model; loops of somebody else call `base_model`, or the towers of a CLIP. Where
the model itself does not run, each forward of a part that is all of it but single layers is a step. Of smaller parts a
step is a series of forwards in which none comes again, nor one that came before another: an image tower and a text
tower; a vision tower and the first token, then each further token by itself. What a model runs before its own forward,
such as the encoder before the first token, is part of the forward's step, as is what it runs between two of its
forwards while it generates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StandIns:
    """What the host knows of the calls of parts in a run."""

    def __init__(self) -> None:
        self.led: bool | None = None  # whether the model has been called since its `generate` was; None outside of it
        self.reset()

    def reset(self) -> None:
        """Another run begins."""
        self._ranks: dict[str, int] = {}  # of parts, in the order of their first calls
        self._latest: int | None = None  # rank of the latest part in the latest step; None if that has all of them
        self._closed = False  # whether no other part belongs to the latest step
        self._in_a_row = 0  # steps that parts began since the latest that has all of them

    def begins(self, part: str, generates: bool) -> bool | None:
        """Whether a call of a part begins a step, or belongs to the latest; None if to the model's next one."""
        if self.led:
            return None
        rank = self._ranks.setdefault(part, len(self._ranks))
        begins = self._latest is None or self._closed or rank <= self._latest
        self._latest, self._closed = rank, generates
        self._in_a_row += begins
        return begins

    def joins(self) -> bool:
        """Whether a forward of the model, or of a part that is all of it, goes on with the step that a part began."""
        joins = self._in_a_row == 1 and not self._closed
        self._latest, self._in_a_row = None, 0
        if self.led is not None:
            self.led = True
        return joins

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside the `generate` of the model."""
        before, self.led = self.led, False
        try:
            yield
        finally:
            self.led = before
