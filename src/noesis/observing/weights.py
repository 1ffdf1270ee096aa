"""Parameters, their gradients and their updates, measured by the same kernels as outputs when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..internals import undisturbed
from ..layers import Batch, measurable
from ..results import ParameterNorms
from .recorder import Recorder


class Weights:
    """What is known of a model's parameters at the times it was asked; nothing is read on the way."""

    def __init__(self, parameters: Mapping[str, Tensor], device: torch.device, capacity: int) -> None:
        self.names = list(parameters)
        given: dict[str, Any] = {"capacity": capacity, "samples": 0, "every": 1, "stats": ParameterNorms.NEEDED}
        self.values, self.gradients, self.updates = (
            Recorder(self.names, device, **given, settings={}) for _ in range(3)
        )
        self.before: dict[str, Tensor] = {}  # as they were the last time
        self.weighed_at: int | None = None  # forwards that the host had begun by the last time; None once it was read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": {}}  # a copy of the model need not carry its parameters twice

    @property
    def recorders(self) -> tuple[Recorder, Recorder, Recorder]:
        """Of values, gradients and updates, with the same steps."""
        return self.values, self.gradients, self.updates

    def weigh(self, parameters: Mapping[str, Tensor], forwards: int) -> None:
        """Measure all of them as they are now, after so many forwards; does not wait for their device."""
        # Outside inference mode, whoever calls: inference tensors could not be written to later.
        with undisturbed(), torch.inference_mode(False), torch.no_grad():
            for recorder in self.recorders:
                recorder.begin(None, Batch(1))
            for index, name in enumerate(self.names):
                parameter = parameters.get(name)
                if parameter is None:
                    self.values.unmeasured[name] = "the model has no parameter of this name any more"
                    continue
                here = self._measure(self.values, index, parameter)
                if parameter.grad is not None:
                    self._measure(self.gradients, index, parameter.grad)
                if here is not None and parameter.requires_grad:
                    self._update(index, name, here)
            for recorder in self.recorders:
                recorder.end()
        self.weighed_at = forwards

    def _measure(self, recorder: Recorder, index: int, x: Tensor) -> Tensor | None:
        here, reason = measurable(x.detach())
        if reason is not None:
            recorder.unmeasured[self.names[index]] = reason
            return None
        recorder.observe(here, index, recorder.places[index])
        measured: Tensor = here
        return measured

    def _update(self, index: int, name: str, now: Tensor) -> None:
        before = self.before.get(name)
        if before is None or before.shape != now.shape or before.device != now.device:
            self.before[name] = now.clone()
            return
        # The difference of two half-precision numbers needs more digits than they have.
        wide = now.float() if now.element_size() < 4 else now
        self._measure(self.updates, index, wide - before)
        before.copy_(now)

    def norms(self, meta: Mapping[str, Any]) -> ParameterNorms:
        """What is known; waits for the device."""
        values, gradients, updates = (recorder.trace() for recorder in self.recorders)
        self.weighed_at = None
        return ParameterNorms.of(values, gradients, updates, dict(meta))

    def reset(self) -> None:
        """Forget what was measured; updates go on from the parameters as they were the last time."""
        for recorder in self.recorders:
            recorder.reset({})
        self.weighed_at = None
