"""How layers are: which of them are dead, explode or vanish, told step by step from their rows.

The root mean square (rms) of a layer's output, or of its gradient, is held against a baseline of its own. Those of
healthy layers grow and shrink by orders of magnitude while a model learns: where a plateau ends, tenfold within 20
steps. So the baseline is a running median of log rms over few steps, and what is found needs both a factor and a
departure that is large against the spread over many, of which the median absolute deviation (MAD) is a robust measure
(Hampel 1974, "The influence curve and its role in robust estimation").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..numerics import Floats, Ints
from ..results import Trace

Mask = NDArray[np.bool_]
Kind = Literal["nonfinite", "dead", "exploding", "vanishing"]
Of = Literal["outputs", "gradients"]
SIDES: tuple[tuple[Kind, int], ...] = (("exploding", 1), ("vanishing", -1))  # of the baseline

#: Steps of a layer that its baseline is the median of.
RECENT = 12
#: Steps of a layer that its spread is taken from.
WINDOW = 100
#: Steps of a layer before it has a baseline.
WARM_UP = 20
#: Steps after which baselines are taken anew.
REFRESH = 4
#: How many robust standard deviations (1.4826 MAD, which is sigma for normal values) an alarm has to be away.
SIGMAS = 6.0
#: Steps in a row that a layer has to be dead.
PATIENCE = 10
#: Steps in a row that a gradient has to have vanished: a batch that is learned already has hardly any.
SCARCE = 3
#: A standard deviation below this share of the rms is that of a constant in float32.
CONSTANT = 1e-6


class Finding(NamedTuple):
    """What is new with a layer at a step."""

    kind: Kind
    layer: int
    since: int  # number of the step
    value: float
    expected: float
    text: str


class Condition:
    """How the layers of a model are by their outputs, or by their gradients."""

    def __init__(self, layers: int, of: Of, dead: float | None, factors: Mapping[Kind, float | None]) -> None:
        self.of: Of = of
        self.dead, self.factors = dead, factors
        self.baselines = Baselines(layers)
        self.active: dict[Kind, Mask] = {kind: np.zeros(layers, bool) for kind in ("dead", "exploding", "vanishing")}
        self.bad = np.zeros(layers, bool)  # NaN or infinity in the latest step that the layer ran in
        self.always_bad = np.ones(layers, bool)  # in every step so far, as a layer that gives a mask is
        self._lifeless = Streak(layers, PATIENCE)
        self._far = {kind: Streak(layers, SCARCE if of == "gradients" and sign < 0 else 1) for kind, sign in SIDES}

    @property
    def going_on(self) -> bool:
        """Whether NaN or infinities have come up that were not always there, and are there still."""
        return bool((self.bad & ~self.always_bad).any())

    def newly_bad(self, ran: Mask, nonfinite: Floats) -> Mask:
        """The layers that NaN or infinity came up in at a step."""
        now = np.where(ran, nonfinite > 0, self.bad)
        new = now & ~self.bad
        self.bad = now
        self.always_bad &= now | ~ran
        return np.asarray(new)

    def findings(self, trace: Trace, place: int, ran: Mask, first: Mask, order: Ints) -> Iterator[Finding]:
        """What is newly dead, exploding or vanishing at a step.

        Args:
            trace: one with the step.
            place: its place in the trace.
            ran: layers with something new in their rows, bool `[layers]`.
            first: those of them that the step is looked at for the first time for.
            order: places of the layers in order of execution.
        """
        rms = np.hypot(trace["mean"][place], trace["std"][place])
        yield from self._newly_dead(trace, place, rms, first, order)
        measured = ran & (rms > 0)  # silence is not a matter of scale
        log = np.log(rms, where=measured, out=np.full(len(rms), np.nan))
        median, sigma = self.baselines.now()
        away = log - median
        usual = np.isfinite(log) & first
        for kind, sign in SIDES:
            factor = self.factors[kind]
            if factor is None:
                continue
            active, streak = self.active[kind], self._far[kind]
            far = (sign * away > math.log(factor)) & (sign * away > SIGMAS * sigma)
            back = sign * away < math.log(factor) / 2
            new = streak.lasts(far, measured, int(trace.steps[place])) & ~active
            active |= new
            active &= ~(measured & back)
            usual &= ~(active | far)
            for layer in order[new[order]]:
                expected = math.exp(median[layer])
                ratio = f"{rms[layer] / expected:.3g} times" if sign > 0 else f"1/{expected / rms[layer]:.3g} of"
                text = f"is {kind}: its rms {rms[layer]:.4g} is {ratio} the usual {expected:.4g}"
                yield Finding(kind, int(layer), int(streak.since[layer]), float(rms[layer]), expected, text)
        self.baselines.take(log, usual)

    def _newly_dead(self, trace: Trace, place: int, rms: Floats, ran: Mask, order: Ints) -> Iterator[Finding]:
        if self.dead is None:
            return
        count, std = trace["count"][place], trace["std"][place]
        alive = np.ones(len(count))
        if self.of == "gradients":
            # Constant gradients are those of a mean, and of long texts judged by one token few are not zero.
            lifeless = (count > 0) & (rms == 0)
        else:
            lifeless = (count > 1) & (std <= CONSTANT * rms)
            if "zeros" in trace.stats:
                alive = 1 - trace["zeros"][place] / np.maximum(count, 1)
                lifeless |= (count > 1) & (alive <= self.dead)
        dead = self._lifeless.lasts(lifeless, ran, int(trace.steps[place]))
        new = dead & ~self.active["dead"]
        self.active["dead"] = dead
        for layer in order[new[order]]:
            few = alive[layer] <= self.dead
            value, expected = (alive[layer], self.dead) if few else (std[layer], 0.0)
            what = f"{100 * alive[layer]:.3g} % of its elements are not zero" if few else "its output is constant"
            if self.of == "gradients":
                value, what = 0.0, "it is zero"
            text = f"is dead: {what}, for {PATIENCE} steps"
            yield Finding("dead", int(layer), int(self._lifeless.since[layer]), float(value), float(expected), text)

    def __repr__(self) -> str:
        masks = {"nonfinite": self.bad, **self.active}
        return ", ".join(f"{int(mask.sum())} {kind}" for kind, mask in masks.items() if mask.any())


class Streak:
    """For how many steps in a row something has been so, layer by layer."""

    def __init__(self, layers: int, patience: int) -> None:
        self.patience = patience
        self.since = np.zeros(layers, np.int64)  # number of the first of these steps
        self._steps = np.zeros(layers, np.int64)

    def lasts(self, so: Mask, ran: Mask, step: int) -> Mask:
        """Where it has been so for as many steps as it takes; a step tells of the layers that ran."""
        self.since = np.where(self._steps > 0, self.since, step)
        self._steps = np.where(ran, np.where(so, self._steps + 1, 0), self._steps)
        return np.asarray(self._steps >= self.patience)


class Baselines:
    """What is usual for log rms, layer by layer: the running median, and the spread around it."""

    def __init__(self, layers: int) -> None:
        self._held = np.full((WINDOW, layers), np.nan)  # a ring for each layer
        self._taken = np.zeros(layers, np.int64)
        self._steps = 0
        self._median = self._sigma = np.full(layers, np.nan)

    def now(self) -> tuple[Floats, Floats]:
        """Median and robust standard deviation; NaN where a layer has none yet."""
        if self._steps % REFRESH == 0:
            latest = (self._taken - 1 - np.arange(RECENT)[:, None]) % WINDOW
            median = _median(np.take_along_axis(self._held, latest, axis=0))
            self._median = np.where(self._taken >= WARM_UP, median, np.nan)
        if self._steps % (4 * REFRESH) == 0:  # it takes longer, and changes less
            self._sigma = 1.4826 * _median(np.abs(self._held - _median(self._held)))
        return self._median, self._sigma

    def take(self, log: Floats, usual: Mask) -> None:
        """Add a step, for the layers in which it is a usual one."""
        self._held[self._taken[usual] % WINDOW, np.flatnonzero(usual)] = log[usual]
        self._taken[usual] += 1
        self._steps += 1


def _median(values: Floats) -> Floats:
    """Over the first axis, NaN left out; far faster than `np.nanmedian`."""
    ordered = np.sort(values, axis=0)  # NaN last
    there = np.maximum((~np.isnan(values)).sum(0), 1)
    columns = np.arange(values.shape[1])
    middle: Floats = (ordered[(there - 1) // 2, columns] + ordered[there // 2, columns]) / 2
    return middle
