"""On a CUDA device: no host sync, the right rows, bitwise equal outputs, graphs. `pytest -m gpu`.

The kernels themselves are compared with float64 in `test_triton.py`, natively where there is a device.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import textwrap
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import noesis

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # torch: it is a prototype
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor: it could be faster and less exact
]


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    torch.cuda.set_sync_debug_mode("default")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))


def captured(wrapped: noesis.Wrapped, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a forward, after three to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                wrapped(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            wrapped(x)
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_outputs(dtype):
    bare = model().to("cuda", dtype)
    observed = copy.deepcopy(bare)
    seen = []
    for layer in bare:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.detach().double()))
    wrapped = noesis.wrap(observed, layers="all", stats=["zeros"], per_sample=4)
    x = torch.randn(4, 3, 16, 16, device="cuda", dtype=dtype)
    assert torch.equal(bare(x), wrapped(x))
    trace = wrapped.trace()
    for index, out in enumerate(seen):
        want = [out.numel(), out.mean(), out.std(), out.abs().mean(), out.min(), out.max(), 0, (out == 0).sum()]
        assert trace.values[0, index] == pytest.approx([float(value) for value in want], rel=1e-5, abs=1e-6)
        assert [s["mean"][0, index] for s in trace.samples] == pytest.approx(out.flatten(1).mean(1).tolist(), abs=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_fifty_steps_without_a_host_sync(gradients):
    wrapped = noesis.wrap(model().cuda(), layers="all", capacity=16, gradients=gradients)
    x = torch.randn(4, 3, 16, 16, device="cuda")
    wrapped(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    wrapped.reset()
    for _ in range(50):
        wrapped(x).sum().backward()
    with wrapped.paused():
        wrapped(x)
    torch.cuda.set_sync_debug_mode("default")
    trace = wrapped.trace()
    assert trace.steps.tolist() == list(range(34, 50))
    assert (trace.values == trace.values[:1]).all()
    if gradients:
        found = wrapped.gradients()
        assert found.steps.tolist() == trace.steps.tolist()
        assert found["count"].tolist() == trace["count"].tolist()
        assert (found["mean"][:, -1] == 1).all()


def test_a_captured_graph_goes_on_recording():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all")
    x = torch.randn(4, 3, 16, 16, device="cuda")
    graph = captured(wrapped, x)
    for scale in (1.0, 2.0):
        x.fill_(scale)
        graph.replay()
    trace = wrapped.trace()
    assert len(trace) == 5
    assert trace["mean"][3, 0] != trace["mean"][4, 0]


@pytest.mark.slow
def test_twenty_thousand_replays_without_a_wrong_row():
    """Large and small outputs: several programs with a ticket, and one alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 4096), nn.GELU(), nn.Linear(4096, 64)).cuda().half().eval()
    wrapped = noesis.wrap(net, layers="all", capacity=1000)
    x = torch.randn(2048, 512, device="cuda", dtype=torch.float16)
    graph = captured(wrapped, x)
    expected = wrapped.trace().values[0]
    for _ in range(20):
        for _ in range(1000):
            graph.replay()
        trace = wrapped.trace()
        assert (trace.values == expected).all()
        assert (trace.calls == 1).all()
    assert trace.steps[-1] == 20_002
    # The totals hold them all: 3 warm-up forwards and 20,000 replays.
    count = trace.stats.index("count")
    np.testing.assert_array_equal(trace.totals[:, count], 20_003 * expected[:, count])


def test_when_steps_of_a_graph_began_is_not_known():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all")
    x = torch.randn(4, 3, 16, 16, device="cuda")
    graph = captured(wrapped, x)  # after forwards 0, 1 and 2
    graph.replay()
    with torch.no_grad():
        wrapped(x)
    trace = wrapped.trace()
    assert np.isnan(trace.seconds).tolist() == [False] * 3 + [True] * 2
    assert (np.diff(trace.seconds[:3]) > 0).all()
    with torch.no_grad():
        wrapped(x)
    assert np.isnan(wrapped.trace().seconds).tolist() == [False] * 3 + [True] * 2 + [False]
    wrapped.reset()
    with torch.no_grad():
        wrapped(x)
    assert np.isfinite(wrapped.trace().seconds).all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_when_steps_of_compiled_code_began(mode):
    net = model().cuda().eval()
    wrapped = noesis.wrap(net, layers="all")
    call = torch.compile(net, mode=mode)
    begun = []
    wrapped.reset()
    start = perf_counter()
    with torch.no_grad():
        for _ in range(5):
            call(torch.randn(4, 3, 16, 16, device="cuda"))
            torch.cuda.synchronize()
            begun.append(perf_counter() - start)
    seconds = wrapped.trace().seconds
    known = np.isfinite(seconds)
    assert known.all() or mode != "default"  # a graph that is replayed has none
    assert (seconds <= begun)[known].all()
    assert (seconds[1:] >= np.array(begun[:-1]) - 1e-3)[known[1:]].all()


def test_every_and_paused_reach_a_captured_graph():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all", every=4)
    graph = captured(wrapped, torch.randn(4, 3, 16, 16, device="cuda"))  # after forwards 0, 1 and 2
    for _ in range(8):  # 3 to 10
        graph.replay()
    with wrapped.paused():
        graph.replay()
    wrapped.every = 3
    for _ in range(4):  # 11 to 14
        graph.replay()
    assert wrapped.trace().steps.tolist() == [0, 4, 8, 12]


def test_a_graph_captured_while_paused_records_later():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all")
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.no_grad():
        wrapped(x)
    with wrapped.paused():
        graph = captured(wrapped, x)
        graph.replay()
    graph.replay()
    assert wrapped.trace().calls.tolist() == [[1] * 5] * 2


def test_a_graph_of_a_part_captured_while_paused_records_later():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all")
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with wrapped.paused():
        graph = captured(wrapped.observed_model[0], x)
        graph.replay()
    graph.replay()
    assert wrapped.trace().calls.tolist() == [[1, 0, 0, 0, 0]]


def test_the_slab_stays_where_a_graph_writes():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all", per_sample=4)
    x = torch.randn(4, 3, 16, 16, device="cuda")
    graph = captured(wrapped, x)
    before = wrapped._recorder.banks[0].slab.data_ptr()
    with torch.no_grad():
        wrapped(torch.cat([x, x]))  # more samples than there is room for
    assert wrapped._recorder.banks[0].slab.data_ptr() == before
    graph.replay()
    trace = wrapped.trace()
    assert "per_sample has room for 4" in trace.unmeasured["0"]
    assert trace.calls[-1].tolist() == [1] * 5


def test_reading_waits_for_every_stream():
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(4096, 4096)).cuda(), layers="all", capacity=64)
    x = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(50):
            wrapped(x)
    assert wrapped.trace().calls.tolist() == [[1]] * 50


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    bare, net = model().cuda().eval(), model().cuda().eval()
    wrapped = noesis.wrap(net, layers="all", capacity=64)
    torch._dynamo.reset()
    counters.clear()
    reference, call = (torch.compile(each, fullgraph=True, mode=mode) for each in (bare, net))
    torch.cuda.synchronize()
    with torch.no_grad():
        for step in range(50):
            x = torch.randn(4, 3, 16, 16, device="cuda")
            assert torch.equal(reference(x).clone(), call(x).clone()), step
    assert counters["stats"]["unique_graphs"] == 2  # one for each model
    assert counters["inductor"]["cudagraph_skips"] == 0
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[1] * 5] * 50
    eager = noesis.wrap(copy.deepcopy(bare), layers="all")
    with torch.no_grad():
        eager(x)
    np.testing.assert_allclose(trace.values[-1], eager.trace().values[0], rtol=1e-4, atol=1e-5)


def test_moved_after_wrapping_and_compiled():
    wrapped = noesis.wrap(model(), layers="all")
    net = wrapped.observed_model.cuda().eval()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(net, fullgraph=True)(torch.randn(4, 3, 16, 16, device="cuda"))
    assert wrapped.trace().calls.tolist() == [[1] * 5]


def test_layers_on_two_streams():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(1024, 4096), nn.Linear(1024, 4096)
            self.side = torch.cuda.Stream()

        def forward(self, x):
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                right = self.right(x)
            left = self.left(x)
            torch.cuda.current_stream().wait_stream(self.side)
            return left, right

    net = Forked().cuda()
    wrapped = noesis.wrap(net, layers="linear", capacity=500)
    x = torch.randn(4096, 1024, device="cuda")
    with torch.no_grad():
        for _ in range(500):
            wrapped(x)
        left, right = wrapped(x)
    values = wrapped.trace().values
    assert (values == values[:1]).all()
    assert values[0, :, wrapped.trace().stats.index("mean")] == pytest.approx(
        [left.double().mean().item(), right.double().mean().item()], abs=1e-6
    )


def test_rows_are_bitwise_equal_over_runs():
    x = torch.randn(64, 3, 16, 16, device="cuda")
    runs = []
    for _ in range(5):
        wrapped = noesis.wrap(model().cuda(), layers="all", per_sample=64)
        for _ in range(10):
            wrapped(x)
        runs.append(wrapped.trace())
    for run in runs[1:]:
        assert (run.values == runs[0].values).all()
        for one, other in zip(run.samples, runs[0].samples, strict=True):
            assert (one.values == other.values).all()


def test_more_elements_than_an_int_holds():
    size = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("needs 6 GB of free device memory")
    x = torch.zeros(size, device="cuda", dtype=torch.float16)
    x[-1], x[2**31 - 1], x[0] = -3.0, 5.0, float("nan")
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="0", stats=["zeros"])
    wrapped.observed_model.cuda()(x)
    row = wrapped.trace().values[0, 0]
    assert row[[0, 4, 5, 6, 7]].tolist() == [size - 1, -3.0, 5.0, 1, size - 3]


def test_memory_added_is_the_state_alone():
    net = model().cuda().eval()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.no_grad():
        net(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        net(x)
        bare = torch.cuda.max_memory_allocated()
        wrapped = noesis.wrap(net, layers="all")
        wrapped(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        wrapped(x)
        added = torch.cuda.max_memory_allocated() - bare
    assert added < 4 << 20


def judged(dtype: torch.dtype = torch.float32) -> noesis.Wrapped:
    wrapped = noesis.wrap(model().cuda().eval().to(dtype), layers=["0", "1"], codebook=noesis.Codebook(), logits="4")
    wrapped.calibrate([torch.randn(40, 3, 16, 16, dtype=dtype) for _ in range(10)], progress=False)
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_surprise_is_as_on_the_cpu(dtype):
    wrapped = judged(dtype)
    x = torch.randn(6, 3, 16, 16, device="cuda", dtype=dtype) * torch.tensor([1, 1, 1, 9, 9, 9]).view(6, 1, 1, 1).cuda()
    with torch.no_grad():
        wrapped(x)
    found = wrapped.surprise()
    assert found.score[3:].min() > found.score[:3].max()
    wrapped.cpu()
    wrapped(x.cpu())
    np.testing.assert_allclose(found.score, wrapped.surprise().score, rtol=0.05, atol=0.2)


def test_keeping_vectors_waits_for_nothing():
    wrapped = judged()
    x = torch.randn(6, 3, 16, 16, device="cuda")
    with torch.no_grad():
        wrapped(x)
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(50):
            wrapped(x)
        torch.cuda.set_sync_debug_mode("default")
    assert len(wrapped.surprise()) == 6


def test_a_graph_keeps_vectors_at_every_replay():
    wrapped = judged()
    x = torch.randn(6, 3, 16, 16, device="cuda")
    graph = captured(wrapped, x)
    for scale in (1, 30, 2):
        fresh = torch.randn(6, 3, 16, 16, device="cuda") * scale
        x.copy_(fresh)
        graph.replay()
        found = wrapped.surprise()
        with torch.no_grad():
            wrapped(fresh)
        np.testing.assert_allclose(found.score, wrapped.surprise().score, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_no_invalid_access_and_no_race():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    program = textwrap.dedent("""
        import torch, noesis
        for per_sample in (False, 3):  # one row and several; outputs of one program and of many
            net = torch.nn.Sequential(torch.nn.Linear(64, 9000), torch.nn.ReLU(), torch.nn.Linear(9000, 3)).cuda()
            wrapped = noesis.wrap(net, layers="all", stats=["zeros"], per_sample=per_sample, capacity=2)
            for _ in range(4):
                wrapped(torch.randn(96, 64, device="cuda"))
                wrapped(torch.randn(3, 64, device="cuda"))
            wrapped.trace()
        net = torch.nn.Sequential(torch.nn.Linear(64, 90), torch.nn.ReLU(), torch.nn.Linear(90, 3)).cuda()
        wrapped = noesis.wrap(net, layers="all", codebook=noesis.Codebook(), logits="2")
        wrapped.calibrate([torch.randn(150, 7, 64)], progress=False)
        wrapped(torch.randn(5, 7, 64, device="cuda"))
        wrapped.surprise()
    """)
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--kernel-regex", "kns=_kernel", "--error-exitcode", "9",
             sys.executable, "-c", program],
            capture_output=True, text=True, check=False, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
