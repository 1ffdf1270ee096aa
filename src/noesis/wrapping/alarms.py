"""Alarms: what went wrong inside a model while it trains, where, and since which step.

Four kinds. `nonfinite`: a NaN or infinity. `dead`: a layer whose output no longer varies, or is almost all zeros, or
whose gradient is zero. `exploding` and `vanishing`: the root mean square (rms) of a layer's output, or of its gradient,
against a baseline of its own, see `condition.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import BadType, BadValue, NoesisError, NoesisWarning
from ..internals import untraced
from ..numerics import Ints
from ..observing import Recorder
from ..results import Trace
from ..text import counted
from .condition import WINDOW, Condition, Finding, Kind, Mask, Of
from .unread import Fresh, Lost, Unread
from .wrapped import Wrapped


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
        step: number of the forward since which it is so, as in `trace.steps`; of a gradient, the forward it belongs to.
        value: number of NaN and infinite elements; share of elements that are not zero, or the standard deviation, of
            a dead layer; otherwise the rms.
        expected: what the value is compared with: 0, the limit, or the running median of the rms.
        message: all this in a sentence.
        at: the number that `check` was given, if any.
        of: `"outputs"`, or `"gradients"` where it is the gradient by the layer's output.
    """

    kind: Kind
    layer: str
    step: int
    value: float
    expected: float
    message: str
    at: int | None = None
    of: Of = "outputs"

    def __str__(self) -> str:
        return self.message


class Alarms:
    """Looks at what a wrapped model recorded, and raises an alarm when a layer goes wrong.

    Call `check` every so many steps: it reads the trace, which waits for the device, and looks at every observed
    forward since the last check, so nothing is missed as long as the ring holds them (`capacity`). If it does not, NaN
    and infinities in the steps that are gone are still found in the totals, the other kinds are not.

    With `wrap(..., gradients=True)` the gradients by the layers' outputs are looked at too, once a backward pass has
    brought them: those of forwards long past as well. Their alarms have `of="gradients"`.

    Each layer raises each kind once, until it has recovered. Of NaN and infinities only the first layer is named, in
    order of execution, or of the backward pass where they came up in gradients: what comes after it, or after the
    optimizer's next step, is its consequence. A layer has exploded when its rms is more than `exploding` times the
    median of its latest 12 usual steps, and in log rms also 6 robust standard deviations (of the latest 100) above it;
    it has vanished likewise, but an output or a gradient of zeros alone is a matter of `dead`. There is no baseline
    during a layer's first 20 steps, and growth that takes longer than a dozen steps for the factor is taken for
    learning. A layer has recovered when it is back within the square root of the factor. Dead layers have to be so for
    10 steps in a row.

    Healthy training raises none as a rule: there was none in 120 runs of 300 steps (20 seeds of three small networks,
    with SGD and AdamW, learning rates as in the tests of this package), while a learning rate x100 was found within 4
    steps in all of 48. A sudden switch to other data may raise some. Evaluation is seen too, if its forwards are
    observed: leave them out by `wrapped.paused()`. Leave layers that are silent or constant on purpose out of `layers`.

    Examples:
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
        gradients: bool = True,
    ) -> None:
        """Alarms that have seen nothing.

        Args:
            wrapped: what `noesis.wrap` returned.
            on_alarm: `"warn"` for one `NoesisWarning` per check, `"raise"` for an `AlarmRaised`, or a function that is
                called with each alarm. `check` returns them in any case (but when it raises).
            nonfinite: look for NaN and infinity.
            dead: a layer is dead when its output is constant, or at most this share of its elements is not zero, which
                needs `wrap(..., stats=["zeros"])`; or when its gradient is zero. None for never.
            exploding: factor above the baseline, more than 1. None for never.
            vanishing: factor below the baseline, more than 1. None for never.
            gradients: look at gradients too, where they are observed. False for a run with a `GradScaler`, which tries
                out at which scale they overflow.

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
        self._recorder = wrapped._recorder
        self._nonfinite, self._dead, self._of_gradients = nonfinite, dead, gradients
        self._factors: dict[Kind, float | None] = {"exploding": exploding, "vanishing": vanishing}
        self.reset()

    def reset(self) -> None:
        """Forget baselines and what was raised; what was recorded so far is not looked at again."""
        recorders: dict[Of, Recorder | None] = {"outputs": self._recorder, "gradients": self._recorder.gradients}
        if not self._of_gradients:
            del recorders["gradients"]
        self._watched = [
            (Condition(len(recorder.names), of, self._dead, self._factors), Unread(recorder))
            for of, recorder in recorders.items()
            if recorder is not None
        ]
        self._run: str = self._recorder.meta["run"]
        self._broken = False  # whether outputs had NaN or infinities that are news in the latest forward
        self._spreading = False  # whether gradients had, and no forward without them has shown that they had no effect
        self._came_from: tuple[int, str] | None = None  # the step and the layer of the gradient that was first

    @untraced
    def check(self, step: int | None = None) -> list[Alarm]:
        """Look at the observed forwards since the last check; waits for the device.

        Args:
            step: a number to be kept in the alarms, such as the optimizer's step.

        Returns:
            New alarms, those of the earliest step first, within a step in order of execution, outputs before gradients.

        Raises:
            AlarmRaised: (a RuntimeError) when there are some, with `on_alarm="raise"`.
        """
        found = list(self._look(step))
        if found:
            self._report(found)
        return found

    # ------------------------------------------------------------ looking

    def _look(self, at: int | None) -> Iterator[Alarm]:
        steps: list[tuple[int, Condition, Trace, Fresh]] = []
        if self._recorder.meta["run"] != self._run:
            self._run, self._came_from = self._recorder.meta["run"], None
        for condition, unread in self._watched:
            trace, fresh, lost = unread.read()
            if lost is not None:
                yield from self._gone(condition, trace, lost, at)
            steps += [(int(trace.steps[each.place]), condition, trace, each) for each in fresh]
        steps.sort(key=lambda each: each[0])  # of one step, outputs stay before gradients
        for _, condition, trace, each in steps:
            for found in self._of_step(condition, trace, each):
                name = trace.layers[found.layer]
                message = f"step {found.since}: {_named(condition, name)} {found.text}"
                yield Alarm(found.kind, name, found.since, found.value, found.expected, message, at=at, of=condition.of)

    def _of_step(self, condition: Condition, trace: Trace, fresh: Fresh) -> Iterator[Finding]:
        place, ran = fresh.place, fresh.new > 0
        order = np.argsort(np.where(ran, trace.order[place], np.iinfo(np.int64).max), kind="stable")
        yield from self._first_bad(condition, trace, place, ran, order)
        yield from condition.findings(trace, place, ran, ran & (fresh.before == 0), order)

    def _first_bad(self, condition: Condition, trace: Trace, place: int, ran: Mask, order: Ints) -> Iterator[Finding]:
        """The first layer that NaN or infinity came up in, unless it is the consequence of an earlier one."""
        number, nonfinite = int(trace.steps[place]), trace["nonfinite"][place]
        backward = condition.of == "gradients"
        follows = condition.going_on or (self._broken if backward else self._spreading)
        new = order[condition.newly_bad(ran, nonfinite)[order]]
        news = len(new) > 0 or condition.going_on
        if backward:
            self._spreading |= news
        else:
            self._broken = news
            self._spreading &= news
        if not self._nonfinite or not len(new) or follows:
            return
        layer = int(new[0])
        text = f"has {counted(int(nonfinite[layer]), 'NaN or infinite element')}"
        if backward:
            self._came_from = number, trace.layers[layer]
            text += ", the first of the backward pass"
        elif self._came_from is not None and 0 < number - self._came_from[0] <= WINDOW:
            step, name = self._came_from
            text += f", which the gradient of layer {name!r} had at step {step} and may have handed on to the weights"
        else:
            text += ", the first of all layers"
        yield Finding("nonfinite", layer, number, float(nonfinite[layer]), 0.0, text)

    def _gone(self, condition: Condition, trace: Trace, lost: Lost, at: int | None) -> Iterator[Alarm]:
        """NaN and infinities in steps that the ring dropped before anyone looked: the totals still count them."""
        layers = np.flatnonzero((lost.nonfinite > 0) & ~(condition.bad & condition.always_bad))
        if not len(layers):
            return
        if self._nonfinite and not any(each.going_on for each, _ in self._watched):
            name, number = trace.layers[layers[0]], float(lost.nonfinite[layers[0]])
            few = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
            message = (
                f"steps {lost.first} to {lost.last}: {_named(condition, name)}{few} had NaN or infinite elements. The "
                "ring no longer holds these steps, so which was first is not known; check more often, or wrap with a "
                "larger capacity"
            )
            yield Alarm("nonfinite", name, lost.last, number, 0.0, message, at, condition.of)
        condition.bad[layers], condition.always_bad[layers] = True, False
        self._spreading |= condition.of == "gradients"

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
        states = [
            f"{'gradients: ' if condition.of == 'gradients' else ''}{told}"
            for condition, _ in self._watched
            if (told := repr(condition))
        ]
        names, looked = len(self._recorder.names), self._watched[0][1].next
        return f"Alarms({'; '.join(states) or 'none now'}; {names} layers, looked at {looked} forwards)"


def _named(condition: Condition, layer: str) -> str:
    return f"{'the gradient of ' if condition.of == 'gradients' else ''}layer {layer!r}"
