"""The switch by which layers that are off call `forward` themselves."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from ..internals import called_as_any
from .off_record import OffRecord


class Switch:
    """Whether layers are passed by, in one place for all of them: they ask at every call."""

    def __init__(self) -> None:
        self.off = False
        self.cuda = self.gradients = False  # what else has to be asked
        self.classes: set[type[Module]] = set()  # that the layers had
        self.off_record: dict[int, OffRecord] = {}  # by thread: layers look, whatever the recorder does

    def __getstate__(self) -> dict[str, Any]:
        # A class may be one that cannot be pickled; and what threads run of the original they do not run of a copy.
        return {**self.__dict__, "classes": set(), "off_record": {}}

    def add(self, cls: type[Module]) -> bool:
        """Whether a layer of this class can ask here."""
        if called_as_any(cls):
            self.classes.add(cls)
            return True
        return False

    def turn(self, off: bool, *, cuda: bool, gradients: bool) -> None:
        """Pass layers by, or do not; and not where somebody has given one of their classes another call."""
        self.off = off and all(map(called_as_any, self.classes))
        self.cuda, self.gradients = cuda, gradients


#: Of layers that have to see every call.
NEVER = Switch()
