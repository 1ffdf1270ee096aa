"""What kernels should leave: fields in float64, and a bank that is driven by hand, by any of the backends."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest
import torch

from noesis.kernels import layout
from noesis.kernels.layout import FIELDS
from noesis.kernels.moments import _numpy as moments_numpy
from noesis.kernels.moments import op as moments
from noesis.kernels.moments import reference
from noesis.kernels.stepping import reference as stepping

EXACT = [layout.COUNT, layout.NONFINITE, layout.ZEROS, layout.MIN, layout.MAX]


def expected(x: torch.Tensor) -> np.ndarray:
    """The fields in float64, by numpy alone."""
    values = x.detach().double().flatten().numpy()
    finite = values[np.isfinite(values)]
    row = np.zeros(len(FIELDS))
    row[layout.COUNT], row[layout.NONFINITE] = len(finite), len(values) - len(finite)
    if len(finite):
        row[layout.MEAN], row[layout.STD] = finite.mean(), finite.std()
        row[layout.ABS_MEAN] = np.abs(finite).mean()
        row[layout.MIN], row[layout.MAX] = finite.min(), finite.max()
        row[layout.ZEROS] = (finite == 0).sum()
    return row


def check(row: np.ndarray, x: torch.Tensor, tolerance: float = 2e-6) -> None:
    want = expected(x)
    np.testing.assert_array_equal(row[EXACT], want[EXACT])
    # The mean may be off by rounding in the largest element; the spread by rounding in itself.
    size = np.abs(want[[layout.MIN, layout.MAX]]).max()
    assert abs(row[layout.MEAN] - want[layout.MEAN]) <= tolerance * size
    assert abs(row[layout.ABS_MEAN] - want[layout.ABS_MEAN]) <= tolerance * size
    assert row[layout.STD] == pytest.approx(want[layout.STD], rel=1e-5, abs=tolerance * size * 1e-3)


class State:
    """The tensors of a bank, by hand."""

    def __init__(
        self,
        capacity: int = 3,
        layers: int = 2,
        samples: int = 0,
        every: int = 1,
        fold: int = 1,
        device: torch.device | str = "cpu",
        fields: int = layout.REQUIRED,
    ) -> None:
        self.fields = fields
        slots, totals = fields + len(layout.COUNTS), fields + layout.AVERAGES
        self.slab = torch.zeros(capacity + 1, 1 + samples, layers, slots, device=device)
        self.totals = torch.zeros(1 + samples, layers, totals, dtype=torch.float64, device=device)
        self.steps = torch.zeros(capacity, layout.STEP, dtype=torch.float64, device=device)
        self.control = torch.zeros(layout.CONTROL, dtype=torch.int64, device=device)
        self.control[layout.EVERY] = every
        self.control[layout.FOLD] = fold
        self.control[layout.SLOT] = capacity
        self.control[layout.ENABLED] = self.control[layout.ACTIVE] = 1

    def all(self) -> tuple[torch.Tensor, ...]:
        return self.slab, self.totals, self.steps, self.control

    @cached_property
    def scratch(self) -> torch.Tensor:
        from noesis.kernels.moments._triton import scratch

        return scratch(self.slab.device, self.fields)


def play(state: State, path: str, samples: int = 0) -> None:
    """Nine forwards with several calls, calls between them, and a crash; by one of the paths."""
    generator = torch.Generator().manual_seed(3)
    device = state.slab.device
    layer = [torch.tensor(0, device=device), torch.tensor(1, device=device)]

    def observe(index: int, x: torch.Tensor) -> None:
        if path == "numba":
            moments.observe_cpu(x, index, samples, True, state.slab.numpy(), state.control.numpy())
        elif path == "numpy":
            if state.control[layout.ACTIVE]:
                moments_numpy.observe(x, samples, True, index, state.slab.numpy(), state.control.numpy())
        elif path == "reference":
            reference.observe_reference(x, layer[index], samples, True, state.slab, state.control)
        else:
            from noesis.kernels.moments._triton import observe_triton

            observe_triton(x.to(device), layer[index], samples, True, state.slab, state.control, state.scratch)

    def begin(number: int) -> None:
        step = (number % 2 - 1, 2)
        timestep = torch.tensor(float(number), dtype=torch.float64, device=device)
        if path in {"numba", "numpy"}:
            stepping.begin_cpu(float(number), *step, *(tensor.numpy() for tensor in state.all()))
        elif path == "reference":
            stepping.begin_reference(timestep, *step, *state.all())
        else:
            from noesis.kernels.stepping._triton import begin_triton

            begin_triton(timestep, *step, *state.all(), state.scratch)

    def end() -> None:
        if path == "triton":
            from noesis.kernels.stepping._triton import end_triton

            end_triton(state.control, len(state.steps))
        else:
            stepping.end(state.control if path == "reference" else state.control.numpy(), len(state.steps))

    for number in range(9):
        if number in (0, 4):
            observe(1, torch.randn(2, 40, generator=generator))  # between forwards
        begin(number)
        observe(0, torch.randn(2, 30, generator=generator) * 2)
        if number != 6:  # a crash in forward 6: the rest is missing, and the step never ends
            observe(1, torch.randn(2, 6000, generator=generator) + 1)
            observe(0, torch.randn(4, 5, generator=generator))
            end()
        if number == 2:  # as when a model calls itself: the inner call has ended the step
            observe(1, torch.randn(2, 8, generator=generator))
            end()
