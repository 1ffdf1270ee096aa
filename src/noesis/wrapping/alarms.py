"""Alarms: what went wrong inside a model while it trains, where, and since which step.

Four kinds. `nonfinite`: a NaN or infinity. `dead`: a layer whose output no longer varies, or is almost all zeros.
`exploding` and `vanishing`: the root mean square (rms) of a layer's output against a baseline of its own. Activations
of healthy layers grow and shrink by orders of magnitude while a model learns: where a plateau ends, tenfold within 20
steps. So the baseline is a running median of log rms over few steps, and an alarm needs both a factor and a departure
that is large against the spread over many, of which the median absolute deviation (MAD) is a robust measure (Hampel
1974, "The influence curve and its role in robust estimation").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import BadType, BadValue, NoesisError, NoesisWarning
from ..numerics import Floats, Ints
from ..results import Trace
from ..text import counted
from .wrapped import Wrapped

Mask = NDArray[np.bool_]
Kind = Literal["nonfinite", "dead", "exploding", "vanishing"]
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
#: A standard deviation below this share of the rms is that of a constant in float32.
CONSTANT = 1e-6


class AlarmRaised(NoesisError, RuntimeError):
    """What `Alarms(..., on_alarm="raise")` raises.

    Attributes:
        alarms: what was found, the first first.
    """

    alarms: tuple[Alarm, ...] = ()


@dataclass(frozen=True)
class Alarm:
    """Something is wrong with a layer.

    Attributes:
        kind: `"nonfinite"`, `"dead"`, `"exploding"` or `"vanishing"`.
        layer: its dotted name.
        step: number of the forward since which it is so, as in `trace.steps`.
        value: number of NaN and infinite elements; share of elements that are not zero, or the standard deviation, of
            a dead layer; otherwise the rms.
        expected: what the value is compared with: 0, the limit, or the running median of the rms.
        message: all this in a sentence.
        at: the number that `check` was given, if any.
    """

    kind: Kind
    layer: str
    step: int
    value: float
    expected: float
    message: str
    at: int | None = None

    def __str__(self) -> str:
        return self.message


class Alarms:
    """Looks at what a wrapped model recorded, and raises an alarm when a layer goes wrong.

    Call `check` every so many steps: it reads the trace, which waits for the device, and looks at every observed
    forward since the last check, so nothing is missed as long as the ring holds them (`capacity`). If it does not, NaN
    and infinities in the steps that are gone are still found in the totals, the other kinds are not.

    Each layer raises each kind once, until it has recovered. Of NaN and infinities only the first layer is named, in
    order of execution: what comes after it, or after the optimizer's next step, is its consequence. A layer has
    exploded when its rms is more than `exploding` times the median of its latest 12 usual steps, and in log rms also 6
    robust standard deviations (of the latest 100) above it; it has vanished likewise, but an output of zeros alone is a
    matter of `dead`. There is no baseline during a layer's first 20 steps, and growth that takes longer than a dozen
    steps for the factor is taken for learning. A layer has recovered when it is back within the square root of the
    factor. Dead layers have to be so for 10 steps in a row.

    Healthy training raises none as a rule: there was none in 120 runs of 300 steps (20 seeds of three small networks,
    with SGD and AdamW, learning rates as in the tests of this package), while a learning rate x100 was found within 4
    steps in all of 48. A sudden switch to other data may raise some. Evaluation is seen too, if its forwards are
    observed: leave them out by `wrapped.paused()`. Leave layers that are silent or constant on purpose out of `layers`.

    Example:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> wrapped = noesis.wrap(model, layers="linear")
        >>> alarms = noesis.Alarms(wrapped, on_alarm=print)
        >>> _ = wrapped(torch.randn(3, 4))
        >>> alarms.check()
        []
        >>> _ = torch.nn.init.constant_(model[1].bias, float("nan"))
        >>> _ = wrapped(torch.randn(3, 4))
        >>> found = alarms.check()
        step 1: layer '1' has 6 NaN or infinite elements, the first of all layers
        >>> found[0].layer, found[0].step
        ('1', 1)
    """

    def __init__(
        self,
        wrapped: Wrapped,
        on_alarm: Literal["warn", "raise"] | Callable[[Alarm], Any] = "warn",
        *,
        nonfinite: bool = True,
        dead: float | None = 0.001,
        exploding: float | None = 10.0,
        vanishing: float | None = 10.0,
    ) -> None:
        """Alarms that have seen nothing.

        Args:
            wrapped: what `noesis.wrap` returned.
            on_alarm: `"warn"` for one `NoesisWarning` per check, `"raise"` for an `AlarmRaised`, or a function that is
                called with each alarm. `check` returns them in any case (but when it raises).
            nonfinite: look for NaN and infinity.
            dead: a layer is dead when its output is constant, or at most this share of its elements is not zero, which
                needs `wrap(..., stats=["zeros"])`. None for never.
            exploding: factor above the baseline, more than 1. None for never.
            vanishing: factor below the baseline, more than 1. None for never.

        Raises:
            NoesisError: when an argument is of another kind or out of range.
        """
        if not isinstance(wrapped, Wrapped):
            raise BadType(f"Alarms({type(wrapped).__name__})", "what noesis.wrap returned", "Wrap the model first")
        if not (callable(on_alarm) or on_alarm in ("warn", "raise")):
            raise BadValue(f"on_alarm={on_alarm!r}", '"warn", "raise" or a function', "Leave on_alarm out to be warned")
        if dead is not None and not 0 <= dead < 1:
            raise BadValue(f"dead={dead!r}", "a share from 0, below 1", "Leave dead out, or pass None for never")
        for name, factor in (("exploding", exploding), ("vanishing", vanishing)):
            if factor is not None and not factor > 1:
                raise BadValue(f"{name}={factor!r}", "a factor above 1", f"Leave {name} out, or pass None for never")
        self.on_alarm = on_alarm
        self._wrapped = wrapped
        self._nonfinite, self._dead = nonfinite, dead
        self._factors: dict[Kind, float | None] = {"exploding": exploding, "vanishing": vanishing}
        self.reset()

    def reset(self) -> None:
        """Forget baselines and what was raised; what was recorded so far is not looked at again."""
        layers = len(self._wrapped.observed_layers)
        self._baselines = _Baselines(layers)
        self._active: dict[Kind, Mask] = {
            "dead": np.zeros(layers, bool),
            "exploding": np.zeros(layers, bool),
            "vanishing": np.zeros(layers, bool),
        }
        self._bad = np.zeros(layers, bool)  # NaN or infinity in the latest step that the layer ran in
        self._always_bad = np.ones(layers, bool)  # in every step so far, as a layer that gives a mask is
        self._lifeless = np.zeros(layers, np.int64)  # steps in a row
        self._since = np.zeros(layers, np.int64)  # the first of them
        trace = self._wrapped._recorder.trace()  # without what came before the run was resumed, as in `_look`
        forwards, observed = self._wrapped._recorder.forward_counts()
        self._run: str = trace.meta["run"]
        self._next: int = forwards  # the number of the next forward to look at
        self._seen: int = observed  # observed forwards up to there
        self._counted = self._total(trace, forwards)

    def check(self, step: int | None = None) -> list[Alarm]:
        """Look at the observed forwards since the last check; waits for the device.

        Args:
            step: a number to be kept in the alarms, such as the optimizer's step.

        Returns:
            New alarms, those of the earliest step first, within a step in order of execution.

        Raises:
            AlarmRaised: (a RuntimeError) when there are some, with `on_alarm="raise"`.
        """
        found = list(self._look(step))
        if found:
            self._report(found)
        return found

    # ------------------------------------------------------------ looking

    def _look(self, at: int | None) -> Iterator[Alarm]:
        recorder = self._wrapped._recorder
        forwards, observed = recorder.forward_counts()
        if recorder.meta["run"] != self._run or forwards < self._next:  # counted from 0 again; baselines stay
            self._run, self._next, self._seen = recorder.meta["run"], 0, 0
            self._counted = np.zeros(len(self._bad))
        missed = observed - recorder.banks[0].capacity > self._seen
        trace = recorder.trace(since=None if missed else self._next)
        if missed:
            yield from self._gone(trace, at)
        for index in np.flatnonzero((trace.steps >= self._next) & (trace.steps < forwards)).tolist():
            number = int(trace.steps[index])
            order = np.argsort(np.where(trace.calls[index] > 0, trace.order[index], np.iinfo(np.int64).max))
            for kind, layer, value, expected, text in self._of_step(trace, index, order):
                name = trace.layers[layer]
                since = int(self._since[layer]) if kind == "dead" else number
                message = f"step {since}: layer {name!r} {text}"
                yield Alarm(kind, name, since, value, expected, message, at)
        if missed:
            self._counted = self._total(trace, forwards)
        else:
            self._counted += trace["nonfinite"][trace.steps < forwards].sum(0)
        self._next, self._seen = forwards, observed

    def _of_step(self, trace: Trace, index: int, order: Ints) -> Iterator[tuple[Kind, int, float, float, str]]:
        """Kind, layer, value, expected and text of what is new in a step."""
        ran = trace.calls[index] > 0
        bad = trace["nonfinite"][index]
        for layer in self._newly_bad(ran, bad, order):
            what = counted(int(bad[layer]), "NaN or infinite element")
            yield "nonfinite", layer, float(bad[layer]), 0.0, f"has {what}, the first of all layers"
        rms = np.hypot(trace["mean"][index], trace["std"][index])
        yield from self._newly_dead(trace, index, rms, order)
        measured = ran & (rms > 0)  # silence is not a matter of scale
        log = np.log(rms, where=measured, out=np.full(len(rms), np.nan))
        median, sigma = self._baselines.now()
        away = log - median
        usual = np.isfinite(log)
        for kind, sign in SIDES:
            factor = self._factors[kind]
            if factor is None:
                continue
            active = self._active[kind]
            far = (sign * away > math.log(factor)) & (sign * away > SIGMAS * sigma)
            back = sign * away < math.log(factor) / 2
            new = far & ~active
            active |= far
            active &= ~(measured & back)
            usual &= ~active
            for layer in order[new[order]]:
                expected = math.exp(median[layer])
                ratio = f"{rms[layer] / expected:.3g} times" if sign > 0 else f"1/{expected / rms[layer]:.3g} of"
                text = f"is {kind}: its rms {rms[layer]:.4g} is {ratio} the usual {expected:.4g}"
                yield kind, int(layer), float(rms[layer]), expected, text
        self._baselines.take(log, usual)

    def _newly_bad(self, ran: Mask, bad: Floats, order: Ints) -> list[int]:
        """The first layer that NaN or infinity came up in, unless it is the consequence of an earlier one."""
        now = np.where(ran, bad > 0, self._bad)
        new = order[(now & ~self._bad)[order]]
        going_on = (self._bad & ~self._always_bad).any()
        self._bad = now
        self._always_bad &= now | ~ran
        return [int(new[0])] if self._nonfinite and len(new) and not going_on else []

    def _newly_dead(
        self, trace: Trace, index: int, rms: Floats, order: Ints
    ) -> Iterator[tuple[Kind, int, float, float, str]]:
        if self._dead is None:
            return
        ran, count, std = trace.calls[index] > 0, trace["count"][index], trace["std"][index]
        lifeless = (count > 1) & (std <= CONSTANT * rms)
        alive = np.ones(len(count))
        if "zeros" in trace.stats:
            alive = 1 - trace["zeros"][index] / np.maximum(count, 1)
            lifeless |= (count > 1) & (alive <= self._dead)
        self._since = np.where(self._lifeless > 0, self._since, trace.steps[index])
        self._lifeless = np.where(ran, np.where(lifeless, self._lifeless + 1, 0), self._lifeless)
        dead = self._lifeless >= PATIENCE
        new = dead & ~self._active["dead"]
        self._active["dead"] = dead
        for layer in order[new[order]]:
            few = alive[layer] <= self._dead
            value, expected = (alive[layer], self._dead) if few else (std[layer], 0.0)
            text = f"{100 * alive[layer]:.3g} % of its elements are not zero" if few else "its output is constant"
            yield "dead", int(layer), float(value), float(expected), f"is dead: {text}, for {PATIENCE} steps"

    def _gone(self, trace: Trace, at: int | None) -> Iterator[Alarm]:
        """NaN and infinities in steps that the ring dropped before anyone looked: the totals still count them."""
        missed = self._total(trace, self._next) - self._counted
        layers = np.flatnonzero((missed > 0) & ~(self._bad & self._always_bad))
        if not len(layers):
            return
        if self._nonfinite and not (self._bad & ~self._always_bad).any():
            name, last = trace.layers[layers[0]], int(trace.steps[0]) - 1
            few = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
            message = (
                f"steps {self._next} to {last}: layer {name!r}{few} had NaN or infinite elements. The ring no longer "
                "holds these steps, so which was first is not known; check more often, or wrap with a larger capacity"
            )
            yield Alarm("nonfinite", name, last, float(missed[layers[0]]), 0.0, message, at)
        self._bad[layers], self._always_bad[layers] = True, False

    @staticmethod
    def _total(trace: Trace, before: int) -> Floats:
        """Elements of each layer that were NaN or infinite in the run, but for held steps from `before` on."""
        total: Floats = trace.totals[:, trace.stats.index("nonfinite")]
        held: Floats = trace["nonfinite"][trace.steps >= before].sum(0)
        return total - held

    # ------------------------------------------------------------ telling

    def _report(self, found: list[Alarm]) -> None:
        if callable(self.on_alarm):
            for alarm in found:
                self.on_alarm(alarm)
            return
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        if self.on_alarm == "raise":
            error = AlarmRaised(
                f"{found[0]}{more}", "", "See .alarms of this error for all, and wrapped.trace() for what led there"
            )
            error.alarms = tuple(found)
            raise error
        warnings.warn(f"{found[0]}{more}", NoesisWarning, stacklevel=3)

    def __repr__(self) -> str:
        active = {kind: int(mask.sum()) for kind, mask in self._active.items() if mask.any()}
        if self._bad.any():
            active = {"nonfinite": int(self._bad.sum()), **active}
        state = ", ".join(f"{number} {kind}" for kind, number in active.items()) or "none now"
        return f"Alarms({state}; {len(self._bad)} layers, looked at {self._next} forwards)"


class _Baselines:
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
