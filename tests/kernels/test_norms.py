"""Norms by the kernel and by the references: one meaning, whatever the elements and however they lie."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from noesis.kernels import norms
from noesis.kernels.norms import op, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same elements in other places of memory."""
    if how == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if how == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "with gaps":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


def by_hand(*given: Tensor | None) -> list[float]:
    now, gradient, old = (None if x is None else x.double() for x in given)
    assert now is not None
    update = None if old is None else now - old
    return [0.0 if x is None else x.norm().item() for x in (now, gradient, update)]


@pytest.mark.parametrize("door", ["numba", "numpy", "any device"])
@pytest.mark.parametrize("how", ["", "channels_last", "transposed", "with gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_float64(dtype: torch.dtype, how: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if door == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(op, "by_numba", lambda _name: None)
    monkeypatch.setattr(reference, "CHUNK", 4000)
    torch.manual_seed(0)
    shapes = [(3, 5, 7, 9), (1, 1, 1, 1), (8, 16, 5, 13), (2, 0, 3, 3)]
    now: list[Tensor | None] = [laid_out(torch.randn(shape).to(dtype), how) for shape in shapes]
    now.append(None)
    gradients = [None if x is None else torch.randn_like(x) * 1e3 for x in now]
    before = [None if x is None else (x + 0.01 * torch.randn_like(x)).contiguous() for x in now]
    gradients[0] = before[1] = None
    expected = [[0.0] * 3 if x is None else by_hand(x, g, b) for x, g, b in zip(now, gradients, before, strict=True)]
    found = torch.full((3, len(now)), torch.nan, dtype=torch.float64)
    observe = norms.observe if door != "any device" else reference.observe_reference
    observe(now, gradients, before, found)
    for at, values in enumerate(expected):
        assert found[:, at].tolist() == pytest.approx(values, rel=1e-6)
    for x, old in zip(now, before, strict=True):
        assert x is None or old is None or torch.equal(x, old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_no_device_a_nonfinite_element_is_lost(dtype: torch.dtype) -> None:
    for observe in (norms.observe, reference.observe_reference):
        for bad in (math.nan, math.inf, -math.inf):
            now = torch.ones(5000, dtype=dtype)
            now[4321] = bad
            found = torch.zeros(3, 1, dtype=torch.float64)
            observe([now], [now], [torch.ones_like(now)], found)
            assert not found.isfinite().any()


def test_large_and_small_elements_do_not_leave_their_range() -> None:
    for observe in (norms.observe, reference.observe_reference):
        for size in (1e-30, 1e30):
            found = torch.zeros(3, 1, dtype=torch.float64)
            observe([torch.full((10_000,), size)], [None], [None], found)
            assert found[0, 0].item() == pytest.approx(100 * size, rel=1e-6)


def test_many_small_ones_are_summed_exactly() -> None:
    x = torch.full((3_000_000,), 0.1)
    found = torch.zeros(3, 1, dtype=torch.float64)
    norms.observe([x], [x], [torch.zeros_like(x)], found)
    assert found.flatten().tolist() == pytest.approx([x[0].double().item() * math.sqrt(x.numel())] * 3, rel=1e-12)
