"""The recorder of gradients: each layer's row is that of the loss' gradient by what the layer returned.

Backward passes come later than the forwards they belong to, and not always in their order. So whoever waits for a
gradient keeps the mark of its forward, and its row goes to that step, as long as the ring holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import WrongState
from .kernels.stepping import ACTIVE, ENABLED, FOLD, SLOT
from .recorder import Recorder

NOWHERE = -1


@dataclass(frozen=True)
class Mark:
    """Which forward a gradient is of."""

    run: int
    step: int  # of the observed ones, from 1; 0 for calls before the first
    batch: int | None


class GradientRecorder(Recorder):
    """A recorder whose steps are the forwards of the model, filled by their backward passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = 0  # resets so far
        self.begun = 0  # observed steps of the run
        self.aim = 0  # the step that rows go to
        for bank in self.banks:
            bank.control[FOLD] = 1  # what is still in the ring may change, so it must not be in the totals yet

    def begin(self, timestep: Tensor | float | None, batch: int) -> None:
        """A forward of the root starts; it never ends, since its gradients come later."""
        super().begin(timestep, batch)
        if self.skipping:
            self.aim = NOWHERE
        else:
            self.begun += 1
            self.aim = self.begun

    def reset(self, meta: dict[str, Any]) -> None:
        """Forget the run and start another one, which gradients of earlier forwards are no part of."""
        super().reset(meta)
        self.run, self.begun, self.aim = self.run + 1, 0, 0

    def mark(self) -> Mark:
        """The forward that is running."""
        return Mark(self.run, self.begun, self.batch)

    def take(self, gradient: Tensor, index: int, mark: Mark) -> None:
        """Merge a gradient into the row of layer `index` of the step it belongs to.

        Raises:
            NoesisError: when the ring no longer holds that step.
        """
        if self.paused or mark.run != self.run:
            return
        if mark.step <= self.begun - self.banks[0].capacity:
            raise WrongState("Its step had left the ring before the backward pass", "a larger ring", "Raise capacity")
        if mark.step != self.aim and not self.on_device:
            for bank in self.banks:
                bank.control[SLOT] = (mark.step - 1) % bank.capacity if mark.step else bank.capacity
                bank.control[ACTIVE] = bank.control[ENABLED]
            self.aim = mark.step
        self.batch = mark.batch
        self.observe(gradient, index, self.places[index])
