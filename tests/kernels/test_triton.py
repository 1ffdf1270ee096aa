"""The Triton kernels against float64: natively on a CUDA device, elsewhere in Triton's interpreter.

Ahead of time they are compiled for real targets too, which finds what the interpreter lets pass.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import noesis
from by_hand import State, check, play
from noesis.kernels import dispatch as kernels
from noesis.kernels import rows
from noesis.kernels.layout import CALLS, FIELDS, ORDER
from noesis.kernels.moments import op as moments
from noesis.kernels.stepping import op as stepping

pytest.importorskip("triton")

from noesis.kernels import layout
from noesis.kernels.launching import LANES
from noesis.kernels.moments import _triton as moments_triton

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
pytestmark = [
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
    # NumPy, which the interpreter computes with, on NaN and, before triton 3.7, on arrays of one element.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def measured(x: torch.Tensor, samples: int = 0, calls: int = 1) -> np.ndarray:
    """The rows [1 + samples, FIELDS] that calls of the kernel leave in the slab.

    `x` is on the device already: bringing it there would close its gaps.
    """
    assert x.device == DEVICE
    state = State(samples=samples, layers=5, device=DEVICE)
    for _ in range(calls):
        moments_triton.observe_triton(
            x, torch.tensor(3, device=DEVICE), samples, True, state.slab, state.control, state.scratch
        )
    slab = state.slab.cpu().numpy()
    assert state.control[layout.SEQUENCE] == calls
    assert not slab[:-1].any()
    assert not slab[-1][:, [0, 1, 2, 4]].any()  # other layers
    return rows.unpack(slab[-1], np.zeros((1 + samples, 5, len(FIELDS))))[:, 3]


def tickets(state: State) -> torch.Tensor:
    """The part of the scratch memory that has to be zero between launches."""
    return state.scratch[:, : state.scratch.shape[1] // (1 + moments_triton.partial(layout.REQUIRED))]


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [0, 1, 2, 63, 123, 1024, 4097, 8193, *(pytest.param(n, marks=pytest.mark.slow) for n in (8192, 70_001, 300_007))],
)
def test_sizes_and_dtypes(size, dtype):
    x = (torch.randn(size) * 3 + 0.5).to(DEVICE, dtype)
    check(measured(x)[0], x)


@given(size=st.integers(1, 50_000), offset=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_size_and_alignment(size, offset, seed):
    x = torch.randn(size + offset, generator=torch.Generator().manual_seed(seed)).to(DEVICE).half()[offset:]
    check(measured(x)[0], x)


@pytest.mark.parametrize("offset", [10.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mean_far_from_zero(offset, dtype):
    x = (torch.randn(100_000) + offset).to(DEVICE, dtype)
    assert measured(x)[0, layout.STD] == pytest.approx(x.double().std(unbiased=False).item(), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.relu(),
        lambda x: -x.abs(),
        torch.zeros_like,
        lambda x: torch.full_like(x, 0.1),
        lambda x: x * 1e-30,
        lambda x: x * 1e30,
        lambda x: x * 1e37,
        lambda x: torch.cat([x * 1e-3, x + 1e4]),
        lambda x: torch.cat([x[:1] + 1e5, x]),  # the first element is far off, as a massive activation
    ],
)
@pytest.mark.parametrize("size", [2000, 20_011])
@pytest.mark.slow
def test_ranges(make, size):
    x = make(torch.randn(size, device=DEVICE))
    check(measured(x)[0], x)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.nan, math.inf, -math.inf], [-math.nan]])
@pytest.mark.parametrize("size", [1, 2, 100, 20_011])
@pytest.mark.slow
def test_nonfinite(bad, size):
    x = torch.randn(size, device=DEVICE)
    for position, value in enumerate(bad):
        x[(position * 7919) % size] = value
    check(measured(x)[0], x)
    x.fill_(bad[0])
    check(measured(x)[0], x)


@pytest.mark.parametrize("samples", [0, 1, 4])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2)[:4],
        lambda x: x.transpose(0, 1)[:4],
        lambda x: x[:, ::2],
        lambda x: x[..., 3:9],
        lambda x: x[:, 1],
        lambda x: x.flip(0),
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x.repeat(1, 1, 40, 1)[:, :, 1::3],
        lambda x: x.unflatten(1, (2, 3)).unflatten(3, (1, 31))[:, :, ::2, :, ::2, ::2],  # more gaps than dimensions
    ],
)
@pytest.mark.slow
def test_strides(view, samples):
    x = view(torch.randn(4, 6, 31, 33, device=DEVICE))
    got = measured(x, samples)
    if samples == 0:
        check(got[0], x)
    else:
        assert not got[0].any()
        for row, part in zip(got[1:], x.chunk(samples), strict=True):
            check(row, part)


def test_dense_layouts_are_read_where_they_lie():
    shape, stride = (4, 6, 31, 33), (6 * 31 * 33, 1, 33 * 6, 6)  # channels_last
    assert moments_triton.strided(shape, stride, 0) == (0, moments_triton._DENSE)
    assert moments_triton.strided(shape, stride, 2) == (2 * 6 * 31 * 33, moments_triton._DENSE)
    assert moments_triton.strided((8, 8), (16, 1), 0) == (0, (1, 8, 8, 0, 0, 16, 1))


def test_a_lazily_negated_view():
    x = torch.randn(500, device=DEVICE, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    check(measured(x)[0], x)


def test_a_module_called_several_times_merges_its_calls():
    torch.manual_seed(0)
    parts = [torch.randn(5000) * scale + shift for scale, shift in [(1, 0), (30, 5), (0.1, -1000)]]
    state = State(layers=1, device=DEVICE)
    for x in parts:
        moments_triton.observe_triton(
            x.to(DEVICE), torch.tensor(0, device=DEVICE), 0, True, state.slab, state.control, state.scratch
        )
    row = rows.unpack(state.slab[-1, 0, 0].cpu().numpy(), np.zeros(len(FIELDS)))
    check(row, torch.cat(parts))
    assert (row[CALLS], row[ORDER]) == (3, 1)


def test_counts_stay_exact_beyond_float32():
    state = State(layers=1, device=DEVICE)
    held = np.zeros((1, len(FIELDS)))
    held[0, [layout.COUNT, layout.NONFINITE, CALLS]] = 2**33 + 1, 2**24 - 1, 1
    state.slab[-1, 0] = torch.from_numpy(rows.pack(held, np.zeros((1, layout.SLOTS), dtype=np.float32)))
    x = torch.tensor([1.0, math.nan], device=DEVICE)
    moments_triton.observe_triton(x, torch.tensor(0, device=DEVICE), 0, True, state.slab, state.control, state.scratch)
    row = rows.unpack(state.slab[-1, 0, 0].cpu().numpy(), np.zeros(len(FIELDS)))
    assert (row[layout.COUNT], row[layout.NONFINITE]) == (2**33 + 2, 2**24)


def test_nothing_is_written_while_inactive():
    state = State(device=DEVICE)
    state.control[layout.ACTIVE] = 0
    before = state.slab.clone(), state.control.clone()
    for size in (10, 70_001):
        x = torch.randn(size, device=DEVICE)
        moments_triton.observe_triton(
            x, torch.tensor(0, device=DEVICE), 0, True, state.slab, state.control, state.scratch
        )
    assert torch.equal(before[0], state.slab)
    assert torch.equal(before[1], state.control)
    assert not state.scratch.any()


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.slow
def test_bitwise_the_same_and_ready_for_the_next(samples):
    x = torch.randn(3, 40_001, device=DEVICE)
    first = measured(x, samples)
    assert all(np.array_equal(measured(x, samples), first) for _ in range(3))
    state = State(samples=samples, device=DEVICE)
    moments_triton.observe_triton(
        x, torch.tensor(0, device=DEVICE), samples, True, state.slab, state.control, state.scratch
    )
    assert state.scratch.any()  # several programs worked on it
    assert not tickets(state).any()


def test_zeros_cost_nothing_unless_asked_for():
    state = State(device=DEVICE)
    moments_triton.observe_triton(
        torch.zeros(9, device=DEVICE),
        torch.tensor(0, device=DEVICE), 0, False, state.slab, state.control, state.scratch,
    )  # fmt: skip
    assert state.slab[-1, 0, 0, layout.ZEROS] == 0
    assert state.slab[-1, 0, 0, layout.COUNT] == 9


# ---------------------------------------------------------------- steps


class Spoil(nn.Module):
    """Puts a NaN into what goes through."""

    active = False

    def forward(self, x):
        return torch.where(torch.arange(x.shape[-1], device=x.device) == 3, math.nan, x) if self.active else x


@pytest.mark.parametrize(
    ("samples", "every", "layers"),  # every pair of values; one program for 2 layers, several for 300
    [(0, 1, 300), (2, 2, 300), (2, 1, 2), (0, 2, 2)],
)
@pytest.mark.slow
def test_steps_are_those_of_the_cpu(samples, every, layers):
    cpu = State(samples=samples, every=every, layers=layers)
    device = State(samples=samples, every=every, layers=layers, device=DEVICE)
    play(cpu, "cpu", samples)
    play(device, "triton", samples)
    for one, other, name in zip(cpu.all(), device.all(), ("slab", "totals", "steps", "control"), strict=True):
        torch.testing.assert_close(
            one, other.cpu(), rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not tickets(device).any()


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"every": 2}, {"stats": ("zeros", "rms")}])
@pytest.mark.slow
def test_a_model_observed_by_the_kernels(options, monkeypatch):
    """From `wrap` to `trace`, as on a CUDA device: the rows are those of the CPU path."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Spoil(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).to(DEVICE)

    by_cpu = noesis.wrap(model().cpu(), layers="all", capacity=4, **options)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "has_triton", lambda device: True)
        monkeypatch.setattr(moments, "has_triton", lambda device: True)
        monkeypatch.setattr(stepping, "has_triton", lambda device: True)
    by_triton = noesis.wrap(model(), layers="all", capacity=4, **options)
    by_triton._recorder.banks[0].arrays = None  # what makes the CPU path the CPU path
    for step in range(7):
        x = torch.randn(2, 3, 16, 16)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for wrapped in (by_cpu, by_triton):
                wrapped.observed_model[2].active = step == 5
                wrapped(x.to(wrapped.observed_model[0].weight.device))
    one, other = by_cpu.trace(), by_triton.trace()
    np.testing.assert_allclose(one.values, other.values, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(one.soulprint().vector, other.soulprint().vector, rtol=1e-5, atol=1e-6)
    assert (one.steps.tolist(), one.dropped_steps) == (other.steps.tolist(), other.dropped_steps)
    np.testing.assert_array_equal(one.order, other.order)
    for a, b in zip(one.samples, other.samples, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=2e-5, atol=1e-6)


# ---------------------------------------------------------------- ahead of time


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_for_real_devices_without_spilling(arch, capsys):
    """A GPU is not needed to compile; the interpreter of this process is left out by a process of its own."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(arch)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    with capsys.disabled():
        sys.stdout.write(f"\nsm_{arch}: registers, bytes spilled\n")
        for name, use in report.items():
            sys.stdout.write(f"  {name:<36} {use['registers']:>4} {use['spilled_bytes']:>4}\n")
    assert len(report) >= 10
    for name, use in report.items():
        # Eight bytes of stack on sm_80, once a step, where kurtosis is asked for.
        assert use["spilled_bytes"] <= (8 if name == "begin 12 fields" else 0), name
        # 256 threads a program, two programs a multiprocessor; coding runs when somebody asks.
        assert 0 < use["registers"] <= (255 if name == "code" else 128), name
    # 16 bytes at a time, or nothing reaches the bandwidth.
    assert all(
        use["wide_loads"] for name, use in report.items() if name in ("moments fp32", "moments fp16", "moments bf16")
    )


def test_every_stream_has_scratch_of_its_own():
    from noesis.kernels.launching import lane

    lanes = [lane(torch.device("cuda", 7), stream) for stream in (0, 11, 12, 11, 0)]
    assert lanes == [0, 1, 2, 1, 0]
    assert lane(torch.device("cuda", 8), 11) == 0
    assert moments_triton.scratch(DEVICE).shape[0] == LANES
