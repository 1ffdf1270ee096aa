"""Promise 4: one graph, no recompile from step to step, and rows as in eager."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import noesis


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)], nn.Linear(8, 2))


def compiled(model: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("options", [{}, {"per_sample": 4, "stats": ("zeros",)}, {"every": 3}])
@pytest.mark.parametrize("order", ["wrap then compile", "compile then wrap"])
def test_one_graph_and_the_rows_of_eager(options, order):
    x = torch.randn(4, 8)
    eager = noesis.wrap(small(), layers="all", **options)
    model = small()
    if order == "wrap then compile":
        wrapped = noesis.wrap(model, layers="all", **options)
        call, counter = compiled(model)
    else:
        call, counter = compiled(model)
        call(x)  # the graph is there already
        wrapped = noesis.wrap(call, layers="all", **options)
    for _ in range(20):
        assert torch.equal(eager(x), call(x))
    assert counter.frame_count == (1 if order == "wrap then compile" else 2)
    one, other = eager.trace(), wrapped.trace()
    np.testing.assert_array_equal(one.steps, other.steps)
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(one.calls, other.calls)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-6, atol=1e-7)
    assert [len(trace.samples) for trace in (one, other)] == [options.get("per_sample", 0)] * 2


def test_compiling_the_container():
    x = torch.randn(4, 8)
    wrapped = noesis.wrap(small(), layers="all")
    call, counter = compiled(wrapped)
    for _ in range(5):
        call(x)
    assert counter.frame_count == 1
    assert wrapped.trace().calls.tolist() == [[1] * 10] * 5


def test_pausing_reaches_compiled_code_without_a_recompile():
    x = torch.randn(4, 8)
    wrapped = noesis.wrap(small(), layers="all")
    call, counter = compiled(wrapped.model)
    call(x)
    with wrapped.paused():
        call(x)
        call(x)
    call(x)
    wrapped.reset()
    call(x)
    assert counter.frame_count == 1
    assert wrapped.trace().steps.tolist() == [0]


def test_training_compiled():
    model = small()
    bare = copy.deepcopy(model)
    wrapped = noesis.wrap(model, layers="all")
    call, counter = compiled(model)
    reference, _ = compiled(bare)
    x = torch.randn(4, 8)
    for _ in range(3):
        for net in (call, reference):
            net(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), bare.parameters(), strict=True))
    assert counter.frame_count == 1
    assert (wrapped.trace().calls == 1).all()


def test_a_python_step_counter_would_recompile():
    """What the device-side cursor avoids: the count of graphs can tell."""

    class Counting(nn.Module):
        step = 0

        def forward(self, x):
            self.step += 1
            return x * self.step

    call, counter = compiled(Counting())
    for _ in range(3):
        call(torch.ones(2))
    assert counter.frame_count > 1


def test_compiled_code_needs_room_for_its_batch():
    wrapped = noesis.wrap(small(), layers="all", per_sample=2)
    call, _ = compiled(wrapped.model)
    with pytest.raises(noesis.NoesisError, match=r"batch of 4, and per_sample has room for 2.*per_sample=4"):
        call(torch.randn(4, 8))


@pytest.mark.slow
def test_inductor():
    x = torch.randn(4, 8)
    wrapped = noesis.wrap(small(), layers="all")
    bare = small()
    call = torch.compile(wrapped.model, fullgraph=True)
    reference = torch.compile(bare, fullgraph=True)
    for _ in range(3):
        assert torch.equal(call(x), reference(x))
    eager = noesis.wrap(small(), layers="all")
    eager(x)
    np.testing.assert_allclose(wrapped.trace().values[-1], eager.trace().values[0], rtol=1e-5, atol=1e-6)
    assert len(wrapped.trace()) == 3


def test_export():
    wrapped = noesis.wrap(small(), layers="all")
    x = torch.randn(4, 8)
    program = torch.export.export(wrapped.model, (x,))
    assert torch.equal(program.module()(x), wrapped(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from Dynamo itself
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["layer by layer", "as a whole"])
def test_recompute_under_checkpointing_is_no_call(how, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = small()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    def train(model: nn.Module) -> noesis.Trace:
        wrapped = noesis.wrap(model, layers="linear")
        for scale in (1.0, 2.0):
            x = torch.full((1, 8), scale, requires_grad=True)
            wrapped(x).sum().backward()
        return wrapped.trace()

    model = Checkpointed()
    if how == "layer by layer":
        model.block.compile(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    expected, trace = train(Checkpointed()), train(model)
    np.testing.assert_array_equal(trace.calls, expected.calls)
    np.testing.assert_allclose(trace.values, expected.values, rtol=1e-6, atol=1e-7)


def test_a_layer_that_cannot_be_measured_costs_no_recompile():
    class Counts(nn.Module):
        def forward(self, x):
            return x.long()

    call, counter = compiled(noesis.wrap(nn.Sequential(nn.Linear(8, 8), Counts()), layers="all").model)
    for _ in range(3):
        call(torch.randn(4, 8))
    assert counter.frame_count == 1
