"""Models that Dynamo compiles into several graphs, or in which it compiles little: rows as in eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import noesis
from helpers.models import TopKRouter

pytestmark = [
    pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 loses rows where graphs break"),
    pytest.mark.usefixtures("one_thread", "fresh_dynamo"),
    # Torch's own, of what it does not trace.
    pytest.mark.filterwarnings("ignore:Dynamo", "ignore:The .grad attribute of a Tensor that is not a leaf"),
]

# ---------------------------------------------------------------- what breaks


class Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * x.sum().tanh().item())


class Prints(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print(end="")
        return x * 1.5


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class PartlyDisabled(nn.Module):
    """Calls its layer in Python, and in compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.apart(x)) + 1

    @torch.compiler.disable
    def apart(self, x: Tensor) -> Tensor:
        return self.inner(x).sin()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None].expand(-1, 3, -1))[0][:, -1]


class Cells(nn.Module):
    """Calls a layer in a loop that breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = x, x
        for _ in range(3):
            state = self.cell(x, state)
            print(end="")
        return state[0]


class Experts(nn.Module):
    """A mixture of experts as it is written for eager code: each expert gets its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = TopKRouter()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.gate(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(indices == number)
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


class Nested(nn.Module):
    """Breaks three modules below."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = Nested(depth - 1) if depth else Break()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x).relu())) + x


class InBlocks(nn.Module):
    """Breaks where Python has something open."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(8, 8), Item(), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        try:
            with torch.autocast("cpu", enabled=False):
                return sum((part(x) for part in self.parts), x)
        finally:
            x = x + 1


class Leaf(nn.Linear):
    """An observed layer that breaks itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        print(end="")
        return y * 2


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.one.register_forward_hook(lambda module, args, output: print(end=""))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


class Around(nn.Module):
    """A model of one's own, whose forward Dynamo compiles; those of torch.nn it only inlines."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.head, self.body, self.tail = nn.Linear(8, 8), nn.Sequential(*parts), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.head(x)).tanh())


def twice() -> nn.Module:
    one = nn.Linear(8, 8)
    return nn.Sequential(one, Break(), one, Item(), one)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "graph_break": lambda: nn.Sequential(nn.Linear(8, 8), Break(), nn.Linear(8, 8)),
    "item": lambda: Around(Item()),
    "print": lambda: Around(Prints()),
    "disabled": lambda: Around(Disabled()),
    "partly disabled": lambda: Around(PartlyDisabled()),
    "branches": lambda: Around(Branches()),
    "lstm": lambda: Around(Recurrent(nn.LSTM)),
    "gru": lambda: Around(Recurrent(nn.GRU)),
    "cells": lambda: Around(Cells()),
    "experts": lambda: Around(Experts()),
    "nested": lambda: Around(Nested()),
    "in blocks": lambda: Around(InBlocks()),
    "leaf": lambda: Around(Leaf(8, 8)),
    "hooked": lambda: Around(Hooked()),
    "one layer again": lambda: Around(twice()),
    "nothing": lambda: Around(nn.GELU()),
}


def some_are_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Those named run by default, on every version of torch; what they stand for, with the slow tests."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def mixed() -> nn.Module:
    """Something of all kinds."""
    return Around(Item(), PartlyDisabled(), Branches(), Recurrent(nn.GRU), Nested(1), Leaf(8, 8))


def few() -> nn.Module:
    """Breaks between layers, in one, and where a layer runs in Python and in compiled code."""
    return Around(Item(), PartlyDisabled(), Leaf(8, 8))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def batches(*sizes: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for size in sizes:
        yield torch.randn(size, 8, generator=generator)


def compiled(model: Any, backend: str = "eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, **options), counter


def assert_like(trace: noesis.Trace, expected: noesis.Trace, *, exact: bool = True) -> None:
    assert trace.unmeasured == expected.unmeasured
    for name in ("steps", "batches", "calls"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(expected, name), err_msg=name)
    for ran, order, other in zip(expected.calls > 0, trace.order, expected.order, strict=True):
        np.testing.assert_array_equal(order[ran], other[ran])
    tolerance = {} if exact else {"rtol": 1e-4, "atol": 1e-5}
    equal = np.testing.assert_array_equal if exact else np.testing.assert_allclose
    equal(trace.values, expected.values, **tolerance)
    equal(trace.totals, expected.totals, **tolerance)
    for one, other in zip(trace.samples, expected.samples, strict=True):
        assert_like(one, other, exact=exact)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", some_are_slow(KINDS, "graph_break"))
def test_rows_are_those_of_eager_code_in_as_many_graphs_as_without(kind: str) -> None:
    """Over several calls, with other batches, which Dynamo compiles again."""
    eager, wrapped = (noesis.wrap(seeded(KINDS[kind]), layers="all") for _ in range(2))
    (call, counter), (bare, expected) = compiled(wrapped.observed_model), compiled(seeded(KINDS[kind]))
    with torch.no_grad():
        for x in batches(4, 4, 6, 2, 6):
            y = call(x)  # first, so that nothing of noesis is warm
            assert torch.equal(y, bare(x))
            assert torch.equal(y, eager(x))
            assert counter.frame_count == expected.frame_count
    assert_like(wrapped.trace(), eager.trace())
    assert (wrapped.trace().calls.sum(0) > 0).all() or kind in ("branches", "experts")


def wrap_and_compile(order: str, make: Callable[[], nn.Module], **options: Any) -> tuple[noesis.Wrapped, Any]:
    model = seeded(make)
    if order == "compile, then wrap":
        call = torch.compile(model, **options)
        return noesis.wrap(call, layers="all"), call
    if order == "compile, run, then wrap":
        call = torch.compile(model, **options)
        call(torch.randn(3, 8))
        return noesis.wrap(call, layers="all"), call
    if order == "compile in place, run, then wrap":
        model.compile(**options)
        model(torch.randn(3, 8))
        return noesis.wrap(model, layers="all"), model
    wrapped = noesis.wrap(model, layers="all")
    if order == "wrap, then compile in place":
        model.compile(**options)
        return wrapped, model
    if order == "a function":
        return wrapped, torch.compile(lambda x: wrapped(x), **options)
    return wrapped, torch.compile(wrapped if order == "the container" else model, **options)


ORDERS = (
    "wrap, then compile", "the container", "a function", "compile, then wrap", "compile, run, then wrap",
    "wrap, then compile in place", "compile in place, run, then wrap",
)  # fmt: skip


@pytest.mark.parametrize("order", some_are_slow(ORDERS, ORDERS[0]))
def test_in_whatever_order_they_are_wrapped_and_compiled(order: str) -> None:
    eager = noesis.wrap(seeded(few), layers="all")
    with torch.no_grad():
        wrapped, call = wrap_and_compile(order, few, backend="eager")
        for x in batches(4, 6, 2):
            assert torch.equal(call(x), eager(x))
        assert_like(wrapped.trace(), eager.trace())
        wrapped.unwrap()
        assert torch.equal(call(x), seeded(few)(x))
    assert len(wrapped.trace()) == 3


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)  # of what no branch used
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "backend", "dynamic"),
    [(ORDERS[0], "inductor", None), (ORDERS[0], "aot_eager", True), (ORDERS[4], "aot_eager", None)],
)
def test_with_other_backends(order: str, backend: str, dynamic: bool | None) -> None:
    make = mixed if backend == "aot_eager" else few
    eager = noesis.wrap(seeded(make), layers="all")
    wrapped, call = wrap_and_compile(order, make, backend=backend, dynamic=dynamic)
    for x in batches(4, 6, 2):
        call(x).sum().backward()
        eager(x)
    assert_like(wrapped.trace(), eager.trace(), exact=False)
    bare = torch.compile(seeded(make), backend=backend, dynamic=dynamic)
    for x in batches(4, 6, 2):
        bare(x).sum().backward()
    assert_same_gradients(wrapped.observed_model, bare)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"per_sample": 8, "stats": ("zeros", "rms")}, {"every": 2}, {"codebook": noesis.Codebook()}], ids=str
)
def test_with_options(options: dict[str, Any]) -> None:
    eager, wrapped = (noesis.wrap(seeded(few), layers="all", **options) for _ in range(2))
    call, _ = compiled(wrapped.observed_model)
    with torch.no_grad():
        if "codebook" in options:
            for each in (eager, wrapped):
                each.calibrate(list(batches(60, 60, 60)), progress=False)
        for number, x in enumerate(batches(4, 4, 6, 2, 4, 6)):
            if number in (1, 3):  # nothing is kept of these
                with eager.paused(), wrapped.paused():
                    assert torch.equal(call(x), eager(x))
                continue
            assert torch.equal(call(x), eager(x))
            if "codebook" in options:
                one, other = wrapped.surprise(), eager.surprise()
                np.testing.assert_array_equal(one.score, other.score)
                np.testing.assert_array_equal(one.p_value, other.p_value)
    assert_like(wrapped.trace(), eager.trace())


@pytest.mark.slow
def test_gradients_are_those_of_eager_code_or_named() -> None:
    eager, wrapped = (noesis.wrap(seeded(mixed), layers="all", gradients=True) for _ in range(2))
    call, _ = compiled(wrapped.observed_model)
    for x in batches(4, 6):
        for each in (call, eager):
            each(x).square().sum().backward()
    assert_same_gradients(wrapped.observed_model, eager.observed_model)
    assert_like(wrapped.trace(), eager.trace())
    found, expected = wrapped.gradients(), eager.gradients()
    np.testing.assert_array_equal(found.steps, expected.steps)
    whole = [name for name in found.layers if name not in found.unmeasured]
    assert {"body.3.rnn", "body.5"} <= set(whole)  # which run in eager code
    for name in whole:
        place = found.layers.index(name)
        np.testing.assert_array_equal(found.calls[:, place], expected.calls[:, place])
        np.testing.assert_allclose(found.layer(name), expected.layer(name), rtol=1e-5)
    assert all("compiled code gives none" in why for why in found.unmeasured.values())


def test_routes() -> None:
    eager, wrapped = (noesis.wrap(seeded(lambda: Around(Experts(), Experts())), layers="routers") for _ in range(2))
    call, _ = compiled(wrapped.observed_model)
    with torch.no_grad():
        for x in batches(4, 4, 6):
            assert torch.equal(call(x), eager(x))
    assert_like(wrapped.trace(), eager.trace())
    for name in ("sums", "whole", "coactivation"):
        np.testing.assert_array_equal(getattr(wrapped.routes(), name), getattr(eager.routes(), name))


@pytest.mark.slow
def test_alarms() -> None:
    wrapped = noesis.wrap(seeded(mixed), layers="linear")
    call, _ = compiled(wrapped.observed_model)
    found: list[noesis.Alarm] = []
    alarms = noesis.Alarms(wrapped, on_alarm=found.append)
    for number, x in enumerate(batches(4, 4, 4)):
        if number == 2:
            nn.init.constant_(wrapped.observed_model.body[2].one.bias, torch.nan)
            nn.init.constant_(wrapped.observed_model.body[2].other.bias, torch.nan)
        call(x)
        alarms.check()
    assert [(alarm.kind, alarm.step) for alarm in found] == [("nonfinite", 2)]
    assert found[0].layer in ("body.2.one", "body.2.other")


def test_capture() -> None:
    kept = []
    for compiling in (False, True):
        model = seeded(few)
        with noesis.capture(model, "all") as activations, torch.no_grad():
            call = compiled(model)[0] if compiling else model
            for x in batches(4, 6):
                call(x)
        kept.append(activations)
    assert list(kept[0]) == list(kept[1])
    for name, calls in kept[0].items():
        assert len(calls) == len(kept[1][name])
        assert all(map(torch.equal, calls, kept[1][name])), name


@pytest.mark.slow
def test_a_forward_that_fails_ends_its_step() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise ValueError("no number")
            return x

    def make() -> nn.Module:
        return Around(Item(), Fails(), nn.Linear(8, 8))

    eager, wrapped = (noesis.wrap(seeded(make), layers="all", per_sample=8) for _ in range(2))
    call, _ = compiled(wrapped.observed_model)
    with torch.no_grad():
        for x in (*batches(4, 6), torch.full((2, 8), torch.nan), *batches(4)):
            for each in (call, eager):
                try:
                    each(x)
                except ValueError:
                    assert x.isnan().all()
    assert_like(wrapped.trace(), eager.trace())


@pytest.mark.slow
def test_what_reads_a_trace_is_not_compiled() -> None:
    """A training step that is compiled as a whole, and looks at what happened."""
    eager, wrapped = (noesis.wrap(seeded(lambda: Around(nn.GELU())), layers="linear") for _ in range(2))
    alarms = noesis.Alarms(wrapped)

    def step(x: Tensor) -> tuple[Tensor, Any, Any]:
        wrapped.every = 2
        y = wrapped(x)
        wrapped.every = 1
        with wrapped.paused():
            wrapped(x)
        z = wrapped(x)
        return y + z, wrapped.trace(), alarms.check()

    call, counter = compiled(step)
    with torch.no_grad():
        for number, x in enumerate(batches(4, 4, 4)):
            call(x)
            for _ in range(2 if number % 2 == 0 else 1):
                eager(x)
            trace = call(x)[1]
    assert counter.frame_count <= 4
    assert (trace.calls == 1).all()


# ---------------------------------------------------------------- how often Dynamo compiles


CODEBOOK: dict[str, Any] = {"codebook": noesis.Codebook()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"per_sample": 16}, CODEBOOK)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", some_are_slow([None, True], None))
@pytest.mark.parametrize("within", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_as_many_compilations_as_without(within: bool, dynamic: bool | None, options: dict[str, Any]) -> None:
    """When the batch changes; 4 is also a size of the recorder's own tensors."""
    counts = []
    for kind in ("bare", "wrapped", "in a function"):
        torch._dynamo.reset()
        model = nn.Sequential(Net()) if within else Net()
        if kind != "bare":
            noesis.wrap(model, layers="all", **options)(torch.randn(16, 8))
        target = (lambda x: model(x)) if kind == "in a function" else model  # noqa: B023
        call, counter = compiled(target, fullgraph=True, dynamic=dynamic)
        counts.append([])
        for x in batches(4, 6, 2, 9, 1, 4):
            call(x)
            counts[-1].append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][-1] == (3 if dynamic is None else 2)


class Pooled(nn.Module):
    """Words of any number, and behind a graph break one vector for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = (self.embed(ids) * attention_mask[..., None]).sum(1)
        torch._dynamo.graph_break()
        return self.head(pooled)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"per_sample": 16}, CODEBOOK], ids=str)
def test_longer_texts_compile_little_more_behind_a_graph_break(options: dict[str, Any]) -> None:
    """With codebooks the mask is looked at there, so that other lengths compile once; the bare model knows of none."""
    counts = []
    for kind in ("bare", "wrapped"):
        torch._dynamo.reset()
        model = Pooled()
        if kind != "bare":
            noesis.wrap(model, layers="leaves", **options)
        call, counter = compiled(model)
        counts.append([])
        for samples, length in ((4, 5), (4, 6), (4, 7), (6, 7), (5, 9)):
            call(torch.ones(samples, length, dtype=torch.int64), torch.ones(samples, length))
            counts[-1].append(counter.frame_count)
    first, *others = (np.diff(counts[1]) - np.diff(counts[0])).tolist()
    assert first == ("codebook" in options)
    assert not any(others)


def test_compiling_while_paused_is_compiling_once_with_samples_too() -> None:
    wrapped = noesis.wrap(Net(), layers="all", per_sample=4)
    call, counter = compiled(wrapped.observed_model, fullgraph=True)
    x = torch.randn(4, 8)
    with wrapped.paused():
        call(x)
    call(x)
    with wrapped.paused():
        call(x)
    assert counter.frame_count == 1
    assert [len(trace) for trace in (wrapped.trace(), *wrapped.trace().samples)] == [1] * 5


@pytest.mark.slow
def test_models_of_many_classes_compile_in_one_process() -> None:
    """Dynamo compiles one function a few times at most: what all observed models have in common must not count."""
    for number in range(12):
        made: Any = type(f"Net{number}", (Net,), {"forward": _forward(number)})
        wrapped = noesis.wrap(made(), layers="all")
        call, counter = compiled(wrapped.observed_model, fullgraph=True)
        call(torch.randn(4, 8))
        assert counter.frame_count == 1


def _forward(number: int) -> Callable[..., Any]:
    found: dict[str, Any] = {}
    exec(f"def forward(self, x):\n    return self.other(self.one(x)) + {number}", found)
    forward: Callable[..., Any] = found["forward"]
    return forward


def test_models_of_one_class_share_what_is_compiled() -> None:
    counter = CompileCounterWithBackend("eager")
    for _ in range(12):
        wrapped = noesis.wrap(Net(), layers="all")
        torch.compile(wrapped.observed_model, backend=counter, fullgraph=True)(torch.randn(4, 8))
        assert (wrapped.trace().calls == 1).all()
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.core
def test_a_model_that_breaks_leaves_others_whole() -> None:
    for make in (lambda: Around(Break()), lambda: nn.Sequential(nn.Linear(8, 8), Break())):
        compiled(noesis.wrap(make(), layers="all").model)[0](torch.randn(4, 8))
    for make in (Net, lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), lambda: Around(nn.GELU())):
        call, counter = compiled(noesis.wrap(make(), layers="all").model, fullgraph=True)
        call(torch.randn(4, 8))
        assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reduce_overhead() -> None:
    eager, wrapped = (noesis.wrap(seeded(mixed).cuda(), layers="all") for _ in range(2))
    call = torch.compile(wrapped.observed_model, mode="reduce-overhead")
    with torch.no_grad():
        for x in batches(4, 4, 4, 6):
            call(x.cuda())
            eager(x.cuda())
    assert_like(wrapped.trace(), eager.trace(), exact=False)
