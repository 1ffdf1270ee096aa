"""On a CUDA device: no host sync, the right rows, bitwise equal outputs. `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import noesis

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    torch.cuda.set_sync_debug_mode("default")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_outputs(dtype):
    bare = model().to("cuda", dtype)
    observed = copy.deepcopy(bare)
    seen = []
    for layer in bare:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.double()))
    wrapped = noesis.wrap(observed, layers="all", stats=["zeros"], per_sample=4)
    x = torch.randn(4, 3, 16, 16, device="cuda", dtype=dtype)
    assert torch.equal(bare(x), wrapped(x))
    trace = wrapped.trace()
    for index, out in enumerate(seen):
        want = [out.numel(), out.mean(), out.std(), out.abs().mean(), out.min(), out.max(), 0, (out == 0).sum()]
        assert trace.values[0, index] == pytest.approx([float(value) for value in want], rel=1e-5, abs=1e-6)
        assert [s["mean"][0, index] for s in trace.samples] == pytest.approx(out.flatten(1).mean(1).tolist(), abs=1e-6)


def test_fifty_steps_without_a_host_sync():
    wrapped = noesis.wrap(model().cuda(), layers="all", capacity=16)
    x = torch.randn(4, 3, 16, 16, device="cuda")
    wrapped(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(50):
        wrapped(x).sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    trace = wrapped.trace()
    assert trace.steps.tolist() == list(range(35, 51))
    assert (trace.values == trace.values[:1]).all()


def test_a_captured_graph_goes_on_recording():
    wrapped = noesis.wrap(model().cuda().eval(), layers="all")
    x = torch.randn(4, 3, 16, 16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            wrapped(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        wrapped(x)
    for scale in (1.0, 2.0):
        x.fill_(scale)
        graph.replay()
    trace = wrapped.trace()
    assert len(trace) == 5
    assert trace["mean"][3, 0] != trace["mean"][4, 0]
