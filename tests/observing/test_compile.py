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
from helpers.models import Block

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)], nn.Linear(8, 2))


def compiled(model: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, "wrap then compile"),
        ({"per_sample": 4, "stats": ("zeros",)}, "compile then wrap"),
        ({"every": 3}, "wrap then compile"),
    ],
)
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


@pytest.mark.slow
@pytest.mark.core
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
    call, counter = compiled(wrapped.observed_model)
    call(x)
    with wrapped.paused():
        call(x)
        call(x)
    call(x)
    wrapped.reset()
    call(x)
    assert counter.frame_count == 1
    assert wrapped.trace().steps.tolist() == [0]


@pytest.mark.slow
@pytest.mark.core
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
    call, _ = compiled(wrapped.observed_model)
    with pytest.raises(noesis.NoesisError, match=r"batch of 4, and per_sample has room for 2.*per_sample=4"):
        call(torch.randn(4, 8))


@pytest.mark.slow
def test_inductor():
    x = torch.randn(4, 8)
    wrapped = noesis.wrap(small(), layers="all")
    bare = small()
    call = torch.compile(wrapped.observed_model, fullgraph=True)
    reference = torch.compile(bare, fullgraph=True)
    for _ in range(3):
        assert torch.equal(call(x), reference(x))
    eager = noesis.wrap(small(), layers="all")
    eager(x)
    np.testing.assert_allclose(wrapped.trace().values[-1], eager.trace().values[0], rtol=1e-5, atol=1e-6)
    assert len(wrapped.trace()) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_the_bare_one(strict):
    """It may run where there is no noesis, so nothing of it is in there; the model stays observed."""
    wrapped = noesis.wrap(small(), layers="all")
    x = torch.randn(4, 8)
    program = torch.export.export(wrapped.observed_model, (x,), strict=strict)
    bare = torch.export.export(small(), (x,), strict=strict)
    targets = [[str(node.target) for node in each.graph.nodes] for each in (program, bare)]
    assert targets[0] == targets[1]
    assert not any("noesis" in target for target in targets[0])
    assert torch.equal(program.module()(x), wrapped(x))
    assert len(wrapped.trace()) == 1


@pytest.mark.parametrize("order", ["wrap then compile", "compile then wrap"])
def test_blocks_compiled_one_by_one_share_one_graph(order):
    """What diffusers calls regional compilation."""
    x = torch.randn(4, 8, requires_grad=True)  # as what comes out of a block does
    model = nn.Sequential(*[Block() for _ in range(6)]).eval()
    counter = CompileCounterWithBackend("aot_eager")

    def compile_blocks():
        for block in model:
            block.compile(fullgraph=True, backend=counter)

    if order == "wrap then compile":
        wrapped = noesis.wrap(model, layers="blocks")
        compile_blocks()
    else:
        compile_blocks()
        model(x)
        wrapped = noesis.wrap(model, layers="blocks")
    for _ in range(3):
        wrapped(x)
    assert counter.frame_count == (1 if order == "wrap then compile" else 2)
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[1] * 6] * 3
    eager = copy.deepcopy(model)
    for block in eager:
        block._compiled_call_impl = None
    fresh = noesis.wrap(noesis.wrap(eager, layers="blocks").unwrap(), layers="blocks")
    fresh(x)
    np.testing.assert_allclose(trace.values[-1], fresh.trace().values[0], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_hundred_steps_through_train_and_eval_with_changing_every():
    wrapped = noesis.wrap(nn.Sequential(small(), nn.Dropout(0.5)), layers="all", every=2)
    call, counter = compiled(wrapped.observed_model)
    x = torch.randn(4, 8)
    observed = []
    for step in range(100):
        if step == 30:
            wrapped.every = 5
        if step == 50:
            wrapped.eval()
        call(x)
        if step % (2 if step < 30 else 5) == 0:
            observed.append(step)
    assert counter.frame_count == 2  # train and eval once each
    assert wrapped.trace().steps.tolist() == observed


def test_eager_and_compiled_forwards_count_together():
    """The host does not see compiled forwards; the device counts all."""
    x = torch.randn(4, 8)
    wrapped = noesis.wrap(small(), layers="all", every=3)
    call, _ = compiled(wrapped.observed_model)
    for step in range(12):
        (wrapped if step in (0, 1, 5, 6, 7) else call)(x)
    trace = wrapped.trace()
    assert trace.steps.tolist() == [0, 3, 6, 9]
    assert (trace.calls == 1).all()


def test_the_state_stays_where_it_is_for_cuda_graphs():
    """Inputs that a graph writes to make torch give up CUDA graphs, unless they are marked so."""
    marked = []

    def backend(graph, _inputs):
        marked.extend(
            (node.name, node.meta["tensor_dict"].get("_dynamo_static_input_type"))
            for node in graph.graph.nodes
            if node.op == "placeholder" and "noesis" in node.name
        )
        return graph.forward

    wrapped = noesis.wrap(nn.Sequential(nn.Linear(8, 8)), layers="all")
    torch.compile(wrapped.observed_model, backend=backend, fullgraph=True)(torch.randn(4, 8))
    assert len(marked) >= 7
    assert {how for _, how in marked} == {"unguarded"}, marked


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from Dynamo itself
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["layer by layer", "as a whole"])
@pytest.mark.slow
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


def test_a_float_timestep_does_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 4)

        def forward(self, x, timestep):
            return self.layer(x).sum()

    model = Timed()
    wrapped = noesis.wrap(model, layers="all")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        call(torch.ones(2, 1), 1 - step / 16)
    assert counter.frame_count <= 2
    np.testing.assert_allclose(wrapped.trace().timesteps, 1 - np.arange(12) / 16)
