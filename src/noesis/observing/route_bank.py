"""What the routers of a wrap keep on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import WrongState
from ..internals import stays
from ..kernels.layout import FORWARDS, NUMBER, OBSERVED
from ..kernels.routing import FIELDS, ROWS, begin_reference, routing_cpu, routing_reference
from ..kernels.runtime import by_value, from_value
from ..layers import Router
from ..numerics import Floats, Ints
from ..results import Routes

#: Memory for the co-activation of single steps; as many of the latest steps as fit are kept.
PAIRS_BYTES = 64 << 20


class RouteBank:
    """The routing state of one device.

    Args:
        device: where it lies.
        layers: number of routers.
        experts: of the router that has most.
        capacity: steps the ring holds.

    Examples:
        >>> import torch
        >>> from noesis.observing.route_bank import RouteBank
        >>> bank = RouteBank(torch.device("cpu"), layers=2, experts=4, capacity=3)
        >>> bank.sums.shape, bank.pairs.shape
        (torch.Size([5, 2, 9]), torch.Size([5, 2, 4, 4]))
    """

    def __init__(self, device: torch.device, layers: int, experts: int, capacity: int) -> None:
        # Outside inference mode, whoever calls: inference tensors could not be written to later.
        with torch.inference_mode(False):
            self.sums = torch.zeros(capacity + 2, layers, experts + FIELDS, dtype=torch.int64, device=device)
            pages = max(1, min(capacity, PAIRS_BYTES // (8 * layers * max(1, experts) ** 2)))
            self.pairs = torch.zeros(pages + 2, layers, experts, experts, dtype=torch.int64, device=device)
            self.last = torch.zeros(layers, 2 + ROWS, dtype=torch.int64, device=device)
            self.layer = [torch.tensor(index, device=device) for index in range(layers)]
            for tensor in (self.sums, self.pairs, self.last, *self.layer):
                stays(tensor)

    def __getstate__(self) -> dict[str, Any]:
        return by_value(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(from_value(state))

    def beside(self, device: torch.device) -> RouteBank:
        """An empty one on another device."""
        return RouteBank(device, len(self.layer), self.pairs.shape[-1], self.sums.shape[0] - 2)

    def begin(self, control: Tensor) -> None:
        """A step has begun in the control block of the same device."""
        if torch.compiler.is_compiling():
            torch.ops.noesis.begin_routing(self.sums, self.pairs, control)
        else:
            begin_reference(self.sums, self.pairs, control)

    def observe(self, logits: Tensor, indices: Tensor, batch: int, layer: int, control: Tensor) -> None:
        """Add a call; see `routing_reference`."""
        state = (self.layer[layer], self.sums, self.pairs, self.last, control)
        if torch.compiler.is_compiling():
            torch.ops.noesis.routing(logits, indices, batch, *state)
        elif control.device.type == "cpu":
            routing_cpu(logits, indices, batch, *state)
        else:
            routing_reference(logits, indices, batch, *state)

    def interrupt(self) -> None:
        """The next token follows none that was seen."""
        self.last.zero_()

    def clear(self) -> None:
        """Forget everything."""
        for tensor in (self.sums, self.pairs, self.last):
            tensor.zero_()


def read_routes(
    found: Sequence[Router],
    banks: Sequence[RouteBank],
    steps: Floats,
    control: Ints,
    *,
    unmeasured: dict[str, str],
    meta: dict[str, Any],
) -> Routes:
    """What the banks of all devices hold; the one place that waits for them.

    Args:
        found: the routers, in the order of the banks' layers.
        banks: one for each device that routers may run on, at the same step.
        steps: what the recorder knows of each step of its ring, [capacity, STEP].
        control: its control block.
        unmeasured: routers that could not be read, and why.
        meta: what is known of the run.
    """
    sums = np.sum([bank.sums.cpu().numpy() for bank in banks], axis=0)
    pairs = np.sum([bank.pairs.cpu().numpy() for bank in banks], axis=0)
    capacity, observed = len(steps), int(control[OBSERVED])
    dropped = max(0, observed - capacity)
    slots = [number % capacity for number in range(dropped, observed)]
    numbers = [int(steps[slot, NUMBER]) for slot in slots]
    kept = len(pairs) - 2
    pages = [number % kept for number in range(max(0, observed - kept), observed)]
    if sums[capacity].any():  # called since the last forward ended
        slots.append(capacity)
        numbers.append(int(control[FORWARDS]))
        pages.append(kept)
    if not slots:
        raise WrongState("No step was observed yet", "at least one forward", "Run the model first")
    return Routes(
        sums=sums[slots],
        experts=np.array([router.experts for router in found]),
        layers=[router.name for router in found],
        steps=np.array(numbers, dtype=np.int64),
        whole=sums[-1],
        coactivation=pairs[-1],
        step_coactivation=pairs[pages],
        dropped_steps=dropped,
        unmeasured=dict(unmeasured),
        meta=dict(meta),
    )
