"""Parameters, their gradients and their updates, measured when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..internals import call_undisturbed
from ..kernels import norms
from ..kernels.runtime import by_value, from_value
from ..layers import measurable
from ..results import ParameterNorms

#: What is there of each parameter.
_Tensors = list[Tensor | None]


class Weights:
    """What is known of a model's parameters at the times it was asked; nothing is read on the way."""

    def __init__(self, parameters: Mapping[str, Tensor], capacity: int) -> None:
        self.names = list(parameters)
        self.capacity = capacity
        self.before: dict[str, Tensor] = {}  # as they were the last time
        self.held: dict[torch.device, Tensor] = {}  # norms [capacity, 3, parameters] of what lies on a device
        self.there: NDArray[np.bool_] = np.zeros((capacity, 3, len(self.names)), bool)  # what was measured
        self.weighings = self.times_asked = 0
        self.unmeasured: dict[str, str] = {}
        # Forwards that the host had begun by the last time that it was asked, and measured; None once it was read.
        self.asked_at: int | None = None
        self.weighed_at: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model need not carry its parameters twice.
        return {**self.__dict__, "before": {}, "held": by_value(self.held)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "held": from_value(state["held"])})

    def ask(self, parameters: Mapping[str, Tensor], forwards: int, every: int) -> None:
        """Measure at every n-th time that it is asked; the time before, keep what parameters are."""
        asked, self.times_asked, self.asked_at = self.times_asked, self.times_asked + 1, forwards
        if asked % every == 0:
            self.weigh(parameters, forwards)
        elif (asked + 1) % every == 0:
            with torch.inference_mode(False), torch.no_grad():
                call_undisturbed(self._remember, parameters)

    def weigh(self, parameters: Mapping[str, Tensor], forwards: int) -> None:
        """Measure all of them as they are now, after so many forwards; does not wait for their device."""
        # Outside inference mode, whoever calls: inference tensors could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            call_undisturbed(self._measure, parameters)
        self.weighed_at = self.asked_at = forwards

    def _measure(self, parameters: Mapping[str, Tensor]) -> None:
        slot = self.weighings % self.capacity
        now, gradients, before = self._given(parameters)
        for device in {x.device for x in now if x is not None} - self.held.keys():
            wide = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64
            self.held[device] = torch.zeros(self.capacity, 3, len(self.names), dtype=wide, device=device)
        for device, held in self.held.items():
            norms.observe(
                [x if x is not None and x.device == device else None for x in now], gradients, before, held[slot]
            )
        for what, found in ((norms.VALUE, now), (norms.GRADIENT, gradients), (norms.UPDATE, before)):
            self.there[slot, what] = [x is not None for x in found]
        self.weighings += 1

    def _given(self, parameters: Mapping[str, Tensor]) -> tuple[_Tensors, _Tensors, _Tensors]:
        """Of each parameter what it is, its gradient, and what it was, as far as they are there."""
        now: _Tensors = []
        gradients: _Tensors = []
        before: _Tensors = []
        for name in self.names:
            parameter = parameters.get(name)
            if parameter is None:
                self.unmeasured[name] = "the model has no parameter of this name any more"
            x = None if parameter is None else self._measurable(name, parameter)
            gradient = None if x is None or parameter is None else parameter.grad
            changes = x is not None and parameter is not None and parameter.requires_grad
            now.append(x)
            gradients.append(None if gradient is None else self._measurable(name, gradient))
            before.append(self._before(name, x) if x is not None and changes else None)
        return now, gradients, before

    def _measurable(self, name: str, x: Tensor) -> Tensor | None:
        here, reason = measurable(x)
        if reason is not None:
            self.unmeasured[name] = reason
            return None
        found: Tensor = here
        return found

    def _before(self, name: str, now: Tensor) -> Tensor | None:
        """What a parameter was the last time; None for the first, of which a copy is kept."""
        before = self.before.get(name)
        if (
            before is not None
            and before.dtype == now.dtype
            and before.device == now.device
            and before.shape == now.shape
        ):
            return before
        self.before[name] = now.clone()
        return None

    def _remember(self, parameters: Mapping[str, Tensor]) -> None:
        now, _, before = self._given(parameters)
        for x, old in zip(now, before, strict=True):
            if x is not None and old is not None:
                old.copy_(x)

    def norms(self, meta: Mapping[str, Any]) -> ParameterNorms:
        """What is known; waits for the device."""
        first = max(0, self.weighings - self.capacity)
        steps = np.arange(first, self.weighings)
        found = np.zeros((len(steps), 3, len(self.names)))
        for held in self.held.values():
            found += held.cpu().numpy()[steps % self.capacity]
        found[np.isnan(found)] = np.inf
        found[~self.there[steps % self.capacity]] = np.nan
        self.weighed_at = self.asked_at = None
        values, gradients, updates = found.transpose(1, 0, 2)
        return ParameterNorms(self.names, steps, values, gradients, updates, dict(self.unmeasured), dict(meta))

    def reset(self) -> None:
        """Forget what was measured; updates go on from the parameters as they were the last time."""
        self.weighings = self.times_asked = 0
        self.unmeasured = {}
        self.asked_at = self.weighed_at = None
