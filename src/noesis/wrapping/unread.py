"""Which steps of a recorder were not looked at yet."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..numerics import Floats, Ints
from ..observing import GradientRecorder, Recorder
from ..results import Trace


class Fresh(NamedTuple):
    """A step with something that was not looked at."""

    place: int  # in the trace
    new: Ints  # calls that were not looked at, by layer
    before: Ints  # calls that were looked at before, by layer


class Lost(NamedTuple):
    """Steps that the ring dropped before they were looked at."""

    first: int
    last: int
    nonfinite: Floats  # elements that were not finite, by layer


class Unread:
    """The steps of a recorder that nobody has looked at, and those that grew since somebody did.

    Gradients come after their forward, and at times to forwards long past. What NaN and infinities there were in steps
    that the ring dropped before they were looked at follows from the totals of the run.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._restart()
        trace = recorder.trace()  # what was recorded so far is not looked at
        self._note(trace, *recorder.forward_counts())
        self._dropped: Floats = _nonfinite_in_all(trace) - trace["nonfinite"].sum(0)
        for place in np.flatnonzero(trace.steps < self.next).tolist():
            self._looked[int(trace.steps[place])] = trace.calls[place], trace["nonfinite"][place]

    def _restart(self) -> None:
        self._run = ""
        self.next = 0  # the number of the next forward to look at
        self._observed = 0  # forwards up to there
        self._turn = 0
        # By the number of a step: its calls, and its elements that are not finite.
        self._looked: dict[int, tuple[Ints, Floats]] = {}
        self._dropped = np.zeros(len(self.recorder.names))  # elements that are not finite, in steps the ring dropped

    def _note(self, trace: Trace, forwards: int, observed: int) -> None:
        self._run, self.next, self._observed = trace.meta["run"], forwards, observed
        if isinstance(self.recorder, GradientRecorder):
            self._turn = self.recorder.turns

    def read(self) -> tuple[Trace, list[Fresh], Lost | None]:
        """A trace, the steps in it with something new, in order, and what was lost, if anything was.

        Waits for the device.
        """
        recorder, (forwards, observed) = self.recorder, self.recorder.forward_counts()
        if recorder.meta["run"] != self._run or forwards < self.next:
            self._restart()  # forwards are counted from 0 again
        missed = observed - recorder.banks[0].capacity > self._observed
        since = max(0, self.next - 1)  # the latest step may have grown
        if isinstance(recorder, GradientRecorder) and (earliest := recorder.earliest_since(self._turn)) is not None:
            since = min(since, earliest)
        trace = recorder.trace(since=None if missed else since)
        lost = self._lost(trace) if missed else None
        fresh = []
        none = np.zeros(len(trace.layers), np.int64)
        for place in np.flatnonzero(trace.steps < forwards).tolist():
            number, calls = int(trace.steps[place]), trace.calls[place]
            before = self._looked.get(number, (none,))[0]
            if (calls > before).any():
                fresh.append(Fresh(place, calls - before, before))
                self._looked[number] = calls, trace["nonfinite"][place]
        while len(self._looked) > recorder.banks[0].capacity:
            _, bad = self._looked.pop(min(self._looked))
            self._dropped = self._dropped + bad
        self._note(trace, forwards, observed)
        return trace, fresh, lost

    def _lost(self, trace: Trace) -> Lost:
        held = set(trace.steps.tolist())
        for number in [number for number in self._looked if number not in held]:
            self._dropped = self._dropped + self._looked.pop(number)[1]
        dropped = _nonfinite_in_all(trace) - trace["nonfinite"].sum(0)
        lost, self._dropped = dropped - self._dropped, dropped
        return Lost(self.next, int(trace.steps[0]) - 1, lost)


def _nonfinite_in_all(trace: Trace) -> Floats:
    """Elements of each layer that were not finite in the whole run."""
    total: Floats = trace.totals[:, trace.stats.index("nonfinite")]
    return total
