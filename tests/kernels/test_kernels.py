"""The kernels against float64: sizes, dtypes, strides, NaN and infinities, merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from torch._subclasses.fake_tensor import FakeTensorMode

from by_hand import EXACT, State, check, expected, play
from helpers.processes import one_thread
from noesis.kernels import dispatch as kernels
from noesis.kernels import layout, rows
from noesis.kernels.layout import CALLS, FIELDS, ORDER, REQUIRED
from noesis.kernels.moments import _numpy as moments_numpy
from noesis.kernels.moments import op as moments
from noesis.kernels.moments import reference
from noesis.kernels.stepping import reference as stepping


def observed_by(observe, x: torch.Tensor) -> np.ndarray:
    state = State(layers=1)
    observe(x, state.slab.numpy(), state.control.numpy())
    return rows.unpack(state.slab[-1, 0, 0].numpy().astype(np.float64), np.zeros(len(FIELDS)))


def by_numba(x: torch.Tensor) -> np.ndarray:
    assert kernels.by_numba("moments") is not None
    return observed_by(lambda x, slab, control: moments.observe_cpu(x, 0, 0, True, slab, control), x)


def by_numpy(x: torch.Tensor) -> np.ndarray:
    return observed_by(lambda x, slab, control: moments_numpy.observe(x, 0, True, 0, slab, control), x)


def by_reference(x: torch.Tensor) -> np.ndarray:
    return reference.measure_reference(reference.by_sample(x, 0), True)[0].numpy()


PATHS = pytest.mark.parametrize("path", [by_numba, by_numpy, by_reference])
SIZES = [1, 2, 3, 63, 123, 4097, moments_numpy.BLOCK - 1, moments_numpy.BLOCK, 2 * moments_numpy.BLOCK + 17]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_dtypes(path, dtype, size):
    x = (torch.randn(size) * 3 + 0.5).to(dtype)
    check(path(x), x)


@pytest.mark.parametrize("size", [moments_numpy.GRAIN + 1, moments_numpy.BLOCK, 2 * moments_numpy.BLOCK + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_thread_takes_other_operations(size, dtype):
    x = (torch.randn(size) * 3 + 0.5).to(dtype)
    with one_thread():
        check(by_numpy(x), x)
        x[size // 2] = math.nan
        check(by_numpy(x), x)


@PATHS
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0, -1000.0])
def test_mean_far_from_zero(path, offset):
    x = torch.randn(300_000) + offset
    assert path(x)[layout.STD] == pytest.approx(expected(x)[layout.STD], rel=2e-6)
    half = (torch.randn(300_000) + offset).half()
    assert path(half)[layout.STD] == pytest.approx(expected(half)[layout.STD], rel=1e-5)


@PATHS
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.relu(),
        lambda x: -x.abs(),
        torch.zeros_like,
        lambda x: torch.full_like(x, 0.1),
        lambda x: x * 1e-30,
        lambda x: x * 1e30,
        lambda x: x * 1e36,
        lambda x: torch.cat([x * 1e-3, x + 1e4]),
    ],
)
def test_ranges(path, make):
    x = make(torch.randn(70_001))
    check(path(x), x)


@PATHS
@pytest.mark.parametrize(
    "bad",
    [[math.nan], [math.inf], [-math.inf], [math.nan, math.inf, -math.inf], [-math.nan]],
)
@pytest.mark.parametrize("size", [1, 2, 100, moments_numpy.BLOCK + 5])
def test_nonfinite(path, bad, size):
    x = torch.randn(size)
    for position, value in enumerate(bad):
        x[(position * 7919) % size] = value
    check(path(x), x)
    check(path(torch.full((size,), bad[0])), torch.full((size,), bad[0]))


@PATHS
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 3:9],
        lambda x: x[:, 1],
        lambda x: x.flip(0),
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x[0, 0, 0, 0],
        lambda x: x[:0],
        lambda x: x.repeat(1, 1, 40, 1)[:, :, 1::3],
    ],
)
def test_strides(path, view):
    x = view(torch.randn(4, 6, 31, 33))
    check(path(x), x)


def test_storage_order_does_not_copy():
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert reference.storage_order(x).data_ptr() == x.data_ptr()
    assert reference.storage_order(x).dim() == 1


def test_counts_are_exact_past_two_to_the_24():
    unpacked = np.zeros((1, len(FIELDS)))
    for count in (2**24 + 1, 2**31 + 12345, 2**40 + 1):
        unpacked[0, layout.COUNT] = unpacked[0, layout.NONFINITE] = unpacked[0, layout.ZEROS] = count
        slots = rows.pack(unpacked, np.zeros((1, layout.SLOTS), dtype=np.float32))
        assert slots.dtype == np.float32
        assert rows.unpack(slots, np.zeros_like(unpacked))[0, layout.COUNT] == count


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(-1e6, 1e6, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), min_size=1, max_size=60
    ),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_any_split_has_the_same_moments(values, cuts):
    x = torch.tensor(values, dtype=torch.float64)
    pieces = torch.tensor_split(x, sorted(cut for cut in cuts if cut < len(x)))
    merged = rows.combine(np.stack([expected(piece) for piece in pieces]))
    whole = expected(x)
    np.testing.assert_array_equal(merged[EXACT], whole[EXACT])
    np.testing.assert_allclose(merged[:6], whole[:6], rtol=1e-9, atol=1e-9)
    # torch gives the same as numpy, which is what runs on the device
    on_device = rows.combine(torch.from_numpy(np.stack([expected(piece) for piece in pieces])), torch)
    np.testing.assert_allclose(on_device.numpy(), merged, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- rows in the slab


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("path", ["numba", "numpy"])
def test_device_path_and_cpu_path_agree(path, samples, every):
    cpu, device = State(samples=samples, every=every), State(samples=samples, every=every)
    play(cpu, path, samples)
    play(device, "reference", samples)
    for one, other, name in zip(cpu.all(), device.all(), ("slab", "totals", "steps", "control"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert int(cpu.control[layout.OBSERVED]) == (9 if every == 1 else 5)


@pytest.mark.parametrize("samples", [0, 2])
def test_adding_several_steps_to_the_totals_at_once(samples):
    one, many = State(samples=samples, capacity=4), State(samples=samples, capacity=4, fold=3)
    play(one, "numba", samples)
    play(many, "numba", samples)
    assert (one.control[layout.FOLDED], many.control[layout.FOLDED]) == (5, 6)
    rest = rows.unpack(one.slab[[5 % 4]].numpy(), np.zeros((1, 1 + samples, 2, REQUIRED)))
    np.testing.assert_allclose(stepping.add_steps(one.totals.numpy(), rest), many.totals.numpy(), rtol=1e-12)


def test_a_step_merges_calls_and_keeps_the_order():
    state = State()
    play(state, "numba")
    last = rows.unpack(state.slab[(9 - 1) % 3, 0].numpy(), np.zeros((2, len(FIELDS))))
    assert last[:, CALLS].tolist() == [2, 1]
    assert last[:, ORDER].tolist() == [1, 2]
    assert last[0, layout.COUNT] == 2 * 30 + 4 * 5


def test_a_lazily_negated_view(one_thread):
    for size in (100, 70_000):
        x = torch.randn(size, dtype=torch.complex64).conj().imag
        assert x.is_neg()
        state = State(layers=1)
        moments.observe_cpu(x, 0, 0, True, state.slab.numpy(), state.control.numpy())
        check(rows.unpack(state.slab[-1, 0, 0].numpy(), np.zeros(len(FIELDS))), x.resolve_neg())


def test_the_device_path_never_waits_for_the_device():
    """On fake tensors any .item() or data-dependent shape raises."""
    with FakeTensorMode():
        state = State(samples=2)
        x = torch.empty(2, 5000)
        stepping.begin_reference(torch.zeros((), dtype=torch.float64), 0, 2, *state.all())
        reference.observe_reference(x, torch.zeros((), dtype=torch.int64), 2, True, state.slab, state.control)
        reference.observe_reference(x, torch.zeros((), dtype=torch.int64), 0, True, state.slab, state.control)
        stepping.end(state.control, 3)
        with pytest.raises(Exception, match=r"data-dependent|aten\._local_scalar_dense"):
            moments.observe_cpu(x, 0, 0, True, state.slab, state.control)  # the check can fail


def test_registered_ops_pass_torchs_own_checks():
    state = State()
    x, layer, scratch = torch.randn(2, 9), torch.tensor(1), torch.zeros(1, 1, dtype=torch.int32)
    torch.library.opcheck(torch.ops.noesis.moments.default, (x, layer, 0, True, state.slab, state.control, scratch))
    timestep = torch.zeros((), dtype=torch.float64)
    torch.library.opcheck(torch.ops.noesis.begin.default, (timestep, 0, 2, *state.all(), scratch))
    torch.library.opcheck(torch.ops.noesis.end.default, (state.control, 3))


def test_a_cuda_device_without_triton_is_named():
    said = []
    logger.enable("noesis")
    handler = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        assert [kernels.has_triton(torch.device(name)) for name in ("cuda:90", "cuda:90", "cpu")] == [False] * 3
    finally:
        logger.remove(handler)
        logger.disable("noesis")
    assert len(said) == 1
    assert said[0].startswith("no Triton on cuda:90, so observing costs many small kernels per layer: ")


@pytest.mark.parametrize("path", [by_numba, by_numpy])
def test_rows_are_bitwise_equal_run_after_run(path):
    x = torch.randn(700_001)
    first = path(x)
    assert all((path(x.clone()) == first).all() for _ in range(5))
    assert (path(torch.cat([x[:1], x])[1:]) == first).all()  # wherever in memory it begins


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, ::2]])
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 4, 50, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [3, 1])
def test_samples_of_any_layout(view, shape, dtype, samples):
    x = view(torch.randn(shape)).to(dtype)
    state = State(layers=1, samples=3)
    moments.observe_cpu(x, 0, samples, True, state.slab.numpy(), state.control.numpy())
    got = rows.unpack(state.slab[-1, :, 0].numpy().astype(np.float64), np.zeros((4, len(FIELDS))))
    for row, part in zip(got[1:], x.split(3 // samples), strict=False):
        check(row, part)
    assert not got[0].any()


def test_every_float16_and_bfloat16_is_read_as_torch_reads_it():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for chunk in bits.view(dtype).split(64):
            check(by_numba(chunk), chunk)


def test_without_numba_numpy_does_it(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    kernels.by_numba.cache_clear()
    try:
        assert kernels.by_numba("moments") is None
        x = torch.randn(100)
        check(observed_by(lambda x, slab, control: moments.observe_cpu(x, 0, 0, True, slab, control), x), x)
    finally:
        kernels.by_numba.cache_clear()
