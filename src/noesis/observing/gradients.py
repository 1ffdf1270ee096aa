"""The recorder of gradients: each layer's row is that of the loss' gradient by what the layer returned.

Backward passes come later than the forwards they belong to, and not always in their order. So whoever waits for a
gradient keeps the mark of its forward, and its row goes to that step, as long as the ring holds it.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import WrongState
from ..internals import node_count, node_number
from ..kernels.layout import ACTIVE, ENABLED, FOLD, SLOT
from ..layers import Batch
from .recorder import Recorder

NOWHERE = -1
#: Forwards whose recomputation is still told apart.
REMEMBERED = 4096


@dataclass(frozen=True)
class Mark:
    """Which forward a gradient is of."""

    run: int
    step: int  # of the observed ones, from 1; 0 for calls before the first
    batch: Batch | None


class GradientRecorder(Recorder):
    """A recorder whose steps are the forwards of the model, filled by their backward passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = 0  # resets so far
        self.begun = 0  # observed steps of the run
        self.aim = 0  # the step that rows go to
        self.turns = 0  # how often rows began to go to another step
        capacity = self.banks[0].capacity
        self.latest_turn = np.zeros(capacity, np.int64)  # of each step in the ring
        self.numbers = np.zeros(capacity, np.int64)  # of the forwards that these steps are
        # Numbers that autograd had given its nodes by the end of each forward, and the mark of those before it.
        self.ends: deque[tuple[int, Mark]] = deque(maxlen=REMEMBERED)
        self.recomputed = Mark(0, 0, None)  # of the latest recomputation
        for bank in self.banks:
            bank.control[FOLD] = 1  # what is still in the ring may change, so it must not be in the totals yet

    def begin(self, timestep: Tensor | float | None, batch: Batch) -> bool:
        """A step begins: gradients go to it, until another one does."""
        super().begin(timestep, batch)
        if self.skipping:
            self.aim = NOWHERE
        else:
            self.begun += 1
            self.numbers[(self.begun - 1) % len(self.numbers)] = self.forwards - 1
            self._turn_to(self.begun)
        return True

    def _turn_to(self, step: int) -> None:
        """Rows go to this step from now on."""
        self.aim = step
        self.turns += 1
        if step:
            self.latest_turn[(step - 1) % len(self.latest_turn)] = self.turns

    def earliest_since(self, turn: int) -> int | None:
        """Number of the earliest forward in the ring that rows may have gone to since a turn; None if there is none."""
        held = min(self.begun, len(self.numbers))
        numbers = self.numbers[:held][self.latest_turn[:held] >= turn]
        return int(numbers.min()) if len(numbers) else None

    def end(self) -> None:
        """A forward is over; its step stays open, since its gradients come later."""
        self.ends.append((node_count(), self.mark()))
        self.skipping = False

    def pause(self, paused: bool) -> None:
        """Stop observing, or go on."""
        if self.paused and not paused:
            self.pass_by()
        super().pause(paused)

    def pass_by(self) -> None:
        """Forwards until here were none of ours."""
        self.ends.append((node_count(), Mark(self.run, NOWHERE, None)))

    def reset(self, meta: dict[str, Any]) -> None:
        """Forget the run and start another one, which gradients of earlier forwards are no part of."""
        super().reset(meta)
        self.ends.append((node_count(), Mark(self.run, NOWHERE, None)))
        self.run, self.begun, self.aim = self.run + 1, 0, 0
        self.latest_turn.fill(0)

    def mark(self) -> Mark:
        """The forward that is running."""
        return Mark(self.run, NOWHERE if self.skipping else self.begun, self.batch)

    def mark_of_recomputed(self) -> Mark:
        """The forward that a backward pass recomputes a part of: its node was made before that forward ended."""
        number, before = node_number(), sys.maxsize
        if number is None:
            raise WrongState(
                "This torch does not say which forward a recomputed layer is of",
                "a torch that does",
                "Observe without activation checkpointing",
            )
        for end, mark in reversed(self.ends):
            if not number < end <= before:  # made since: a checkpoint in what is recomputed; or of another thread
                break
            self.recomputed, before = mark, end
        return self.recomputed

    def take(self, gradient: Tensor, index: int, mark: Mark) -> None:
        """Merge a gradient into the row of layer `index` of the step it belongs to.

        Raises:
            NoesisError: when the ring no longer holds that step.
        """
        if self.paused or mark.run != self.run or mark.step == NOWHERE:
            return
        if mark.step <= self.begun - self.banks[0].capacity:
            raise WrongState("Its step had left the ring before the backward pass", "a larger ring", "Raise capacity")
        if mark.step != self.aim and not self.on_device:
            for bank in self.banks:
                bank.control[SLOT] = (mark.step - 1) % bank.capacity if mark.step else bank.capacity
                bank.control[ACTIVE] = bank.control[ENABLED]
            self._turn_to(mark.step)
        self.batch = mark.batch
        self.observe(gradient, index, self.places[index])
