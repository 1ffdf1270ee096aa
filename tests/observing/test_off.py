"""Promise 3, when off: what is not looked at costs no more than the bare model, and does all that it does."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules import module
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import noesis
from noesis.internals import calls


class Deep(nn.Linear):
    """A layer that counts the Python calls it is inside of."""

    depth = 0

    def forward(self, x: Tensor) -> Tensor:
        frame, self.depth = sys._getframe(), 0
        while frame.f_back is not None:
            frame, self.depth = frame.f_back, self.depth + 1
        return super().forward(x)


class Loud(nn.Linear):
    """A layer with a `__call__` of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Outer(nn.Module):
    """A layer that has layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Outer(), Loud(4, 4))


x = torch.arange(8.0).reshape(2, 4)


def test_a_layer_that_is_off_is_inside_of_no_more_calls() -> None:
    """One call of a layer less, for one of the whole model more."""
    bare = nn.Sequential(Deep(4, 4))
    bare(x)
    wrapped = noesis.wrap(nn.Sequential(Deep(4, 4)), every=2)
    wrapped.observed_model(x)
    on = wrapped.observed_model[0].depth
    wrapped.observed_model(x)  # left out
    left_out = wrapped.observed_model[0].depth
    with wrapped.paused():
        wrapped.observed_model(x)
        assert wrapped.observed_model[0].depth == left_out == bare[0].depth < on
    assert calls.called_as_any(nn.Linear)
    assert not calls.called_as_any(Loud)


def test_a_torch_whose_calls_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LOOKED_AT", (*calls.LOOKED_AT[:-1], "_global_new_hooks"))
    assert not calls._as_known(calls.CALL_IMPL)
    monkeypatch.setattr(calls, "KNOWN", None)
    wrapped = noesis.wrap(nn.Sequential(Deep(4, 4)))
    with wrapped.paused():
        wrapped.observed_model(x)
        short = wrapped.observed_model[0].depth
        monkeypatch.undo()
        wrapped.unwrap()
        noesis.wrap(wrapped.observed_model)._recorder.pause(True)
        wrapped.observed_model(x)
        assert short > wrapped.observed_model[0].depth


@pytest.fixture(params=["paused", "left out"])
def off(request: pytest.FixtureRequest) -> Any:
    """A wrap whose next forwards are not looked at."""
    wrapped = noesis.wrap(small(), layers="all", every=1 << 20)
    wrapped(x)
    if request.param == "paused":
        with wrapped.paused():
            yield wrapped
    else:
        yield wrapped
    assert wrapped.trace().calls.tolist() == [[1] * 5]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("whose", ["the layer's", "every module's"])
def test_hooks_run(off: noesis.Wrapped, whose: str, kind: str) -> None:
    bare, layer = small(), off.model[0]

    def hooked(layer: nn.Module, seen: list[Any]) -> Tensor:
        layer.weight.grad = None
        register: Any = getattr(layer, f"register_{kind}_hook")
        if whose == "every module's":
            register = getattr(module, f"register_module_{kind}_hook")
        handle = register(lambda *given: seen.append(len(given)))
        (off.model if layer is off.model[0] else bare)(x.clone().requires_grad_()).sum().backward()
        handle.remove()
        return layer.weight.grad

    ours: list[Any] = []
    theirs: list[Any] = []
    assert torch.equal(hooked(layer, ours), hooked(bare[0], theirs))
    assert sorted(ours) == sorted(theirs) != []


def test_what_a_call_does_beside(off: noesis.Wrapped, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, model = small(), off.model
    assert torch.equal(model(x), bare(x))  # of a class with a `__call__` too
    for each in (bare, model):
        each[0].forward = lambda x: x + 1  # as accelerate does
    assert torch.equal(model(x), bare(x))
    for each in (bare, model):
        del each[0].forward
        each[1].compile(backend="eager")
    counted: list[str] = []
    torch.compiler.reset()
    with monkeypatch.context() as patch:
        patch.setattr(bare[1], "_compiled_call_impl", lambda x: counted.append("compiled") or x)
        patch.setattr(model[1], "_compiled_call_impl", lambda x: counted.append("compiled") or x)
        assert torch.equal(model(x), bare(x))
    assert counted == ["compiled"] * 2
    for each in (bare, model):
        each[1]._compiled_call_impl = None


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_tracing_by_torch_jit(off: noesis.Wrapped) -> None:
    theirs, ours = (torch.jit.trace(each, x).inlined_graph.nodes() for each in (small(), off.model))
    assert [(node.kind(), node.scopeName()) for node in ours] == [(node.kind(), node.scopeName()) for node in theirs]


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@pytest.mark.parametrize("whose", ["class", "instance"])
def test_calls_that_were_replaced_after_wrapping(name: str, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks for a `__call__` in the class alone."""

    class Own(nn.Linear):
        pass

    wrapped, seen = noesis.wrap(nn.Sequential(Own(4, 4)), every=2), []
    wrapped(x)
    former: Any = getattr(nn.Module, name)

    def call(layer: nn.Module, *args: Any) -> Any:
        seen.append(layer)
        return former(layer, *args)

    layer = wrapped.observed_model[0]
    if whose == "class":
        monkeypatch.setattr(Own, name, call, raising=False)
    else:
        setattr(layer, name, call.__get__(layer))
    wrapped(x)  # left out
    with wrapped.paused():
        wrapped(x)
    assert len(seen) == (0 if (whose, name) == ("instance", "__call__") else 2)


def test_tracing_by_torch_fx(off: noesis.Wrapped) -> None:
    """It puts a call of its own in the place of torch's."""

    class Whole(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: Tensor) -> Tensor:
            return self.inside[1](self.inside[0](x))

    theirs, ours = (torch.fx.symbolic_trace(Whole(each)).graph for each in (small(), off.model))
    assert [node.op for node in ours.nodes] == [node.op for node in theirs.nodes]
    assert "call_module" in {node.op for node in ours.nodes}


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_the_profiler_knows_the_modules(off: noesis.Wrapped, tmp_path: Path) -> None:
    found, path = [], str(tmp_path / "trace.json")
    for model in (small(), off.model):
        with profile(with_stack=True) as seen:
            model(x)
        seen.export_chrome_trace(path)
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        found.append({event["name"] for event in events if "nn.Module: Linear" in event.get("name", "")})
    assert found[0] == found[1] != set()


def test_a_call_that_was_bound_elsewhere() -> None:
    """As checkpointing and `torch.compiler.disable` bind it."""
    wrapped, bare = noesis.wrap(small(), layers="all"), small()
    outside = wrapped.observed_model[1].__call__
    with wrapped.paused():
        inside = wrapped.observed_model[0].__call__
        checkpoint(outside, inside(x), use_reentrant=False).sum().backward()
        bare[1](bare[0](x)).sum().backward()
        assert torch.equal(wrapped.observed_model[0].weight.grad, bare[0].weight.grad)
    outside(inside(x))
    assert wrapped.trace().calls.tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_what_is_recomputed_while_off(reentrant: bool) -> None:
    """Layers are off within a forward; a backward pass recomputes what was observed in the one before."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.deep = Outer(), Deep(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if later := saved[-1:]:
                later[0].sum().backward()
            return self.deep(checkpoint(self.block, x, use_reentrant=reentrant))

    saved: list[Tensor] = []
    wrapped = noesis.wrap(Checkpointed(), layers=["block.inner", "deep"], gradients=True, every=2)
    y = wrapped(x.clone().requires_grad_())
    on = wrapped.observed_model.deep.depth
    saved.append(y)
    wrapped(x.clone().requires_grad_())  # left out
    assert wrapped.observed_model.deep.depth < on
    assert wrapped.gradients().calls.tolist() == [[1, 1]]


def test_what_is_unwrapped_or_given_a_class_while_paused() -> None:
    wrapped = noesis.wrap(small(), layers="linear")
    with wrapped.paused():
        layer = wrapped.observed_model[0]
        layer.__class__ = type("Sharded", (type(layer),), {})  # as `fully_shard` does
        wrapped(x)
    wrapped(x)
    assert wrapped.trace().calls.tolist() == [[1] * 3]
    with wrapped.paused():
        again = noesis.wrap(wrapped.unwrap(), layers="linear")
        again(x)
    assert again.trace().calls.tolist() == [[1] * 3]


def test_what_is_copied_while_paused() -> None:
    wrapped = noesis.wrap(small(), layers="linear")
    wrapped(x)
    with wrapped.paused():
        copies = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
        for each in copies:
            each(x)  # it is the original that is paused
            wrapped(x)
    for each in copies:
        assert each.trace().calls.tolist() == [[1] * 3] * 2
    assert wrapped.trace().calls.tolist() == [[1] * 3]


def test_what_is_copied_within_a_forward_that_is_left_out() -> None:
    class Copying(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if wrapped._recorder.skipping:
                copies.extend([copy.deepcopy(wrapped._recorder), pickle.loads(pickle.dumps(wrapped._recorder))])
            return super().forward(x)

    copies: list[Any] = []
    wrapped = noesis.wrap(nn.Sequential(Copying(4, 4)), every=2)
    wrapped(x)
    wrapped(x)
    assert [one.switch.off for one in copies] == [False, False]


def test_what_is_copied_while_calibrating() -> None:
    wrapped = noesis.wrap(small(), layers="linear", codebook=noesis.Codebook(size=4))
    copies: list[Any] = []

    def batches() -> Any:
        for batch in torch.randn(8, 32, 4):
            copies.append(copy.deepcopy(wrapped))
            yield batch

    wrapped.calibrate(batches())
    copies[4](x)
    assert copies[4].trace().calls.tolist() == [[1] * 3]


def test_calibrating_while_paused() -> None:
    batches = list(torch.randn(8, 32, 4))
    wrapped = noesis.wrap(small(), layers="linear", codebook=noesis.Codebook(size=4))
    with wrapped.paused():
        wrapped.calibrate(batches)
    wrapped(x)
    assert list(wrapped.surprise().layers) == wrapped.observed_layers
    assert wrapped.trace().calls.tolist() == [[1] * 3]


@pytest.fixture
def counter(fresh_dynamo: None) -> Any:
    with torch.no_grad():
        yield CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("how", ["as a whole", "by block"])
@pytest.mark.parametrize("layers", [Outer, pytest.param("all", marks=pytest.mark.slow)])
def test_compiling_while_paused_is_compiling_once(counter: Any, how: str, when: str, layers: Any) -> None:
    wrapped = noesis.wrap(small(), layers=layers)

    def compile_() -> Any:
        if how == "as a whole":
            return torch.compile(wrapped.observed_model, backend=counter)
        wrapped.observed_model[1].compile(backend=counter)
        return wrapped.observed_model

    call = compile_() if when == "before" else None
    wrapped(x)  # in eager code, where it is compiled as a whole
    with wrapped.paused():
        call = call or compile_()
        call(x)
        call(x)
    assert counter.frame_count == 1
    for _ in range(2):
        call(x)
        with wrapped.paused():
            call(x)
    assert counter.frame_count == 1
    assert (wrapped.trace().calls == 1).all()
    assert len(wrapped.trace()) == 3
