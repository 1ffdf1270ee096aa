"""Names that versions of torch and its neighbours do not share: looked up in one place, and done without."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.checkout import ROOT
from helpers.models import small
from helpers.processes import python
from internals_case import names
from noesis.internals import compiling, cuda, libraries, lookup, stays
from noesis.kernels.launching import Kernel
from noesis.observing.evidence import Evidence

LIBRARIES = {"torch", "triton", "numba", "transformers", "diffusers", "accelerate", "peft", "lightning"}

# ---------------------------------------------------------------- taken away


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a quiet machine
@pytest.mark.parametrize("kind", [pytest.param("missing", marks=pytest.mark.core), "other"])
def test_what_every_name_does_when_it_is_gone_or_another(kind: str) -> None:
    """Bitwise outputs and right rows, or layers reported by name; never an exception in a forward."""
    done = python(Path(__file__).with_name("internals_case.py"), kind, timeout=None)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # gloo prints too
    cases = [json.loads(line) for line in lines]
    assert [tuple(case["taken"]) for case in cases] == [(), *names()]
    assert [case for case in cases if case["problems"]] == []


def test_a_name_that_is_gone_or_does_not_fit_is_not_found() -> None:
    def look_up(*paths: str, fits: Callable[[Any], bool] = callable) -> Any:
        return lookup.look_up(*paths, fits=fits, instead="nothing")

    assert look_up("torch:is_tensor") is torch.is_tensor
    assert look_up("torch:no_such", "torch.no_such:thing", "torch:is_tensor") is torch.is_tensor
    assert look_up("torch:no_such") is None
    assert look_up("torch:is_tensor", fits=lambda found: found.no_such) is None


def test_no_private_name_is_used_elsewhere() -> None:
    """But for what `Observed.__call__` looks at itself, which `internals.calls` knows."""
    found = {}
    for path in sorted((ROOT / "src" / "noesis").rglob("*.py")):
        if "internals" not in path.parts:
            found[path.name] = private(path.read_text(encoding="utf-8"))
    assert {name: names for name, names in found.items() if names} == {}
    assert private("import torch._C\nfrom torch.nn import _x\ntorch.a._b(torch.c.__name__)") == [
        "torch._C", "torch.nn._x", "torch.a._b"
    ]  # fmt: skip
    assert set(private("x._local_tensor\ny._orig_mod\nx._initialize()\nself._orig")) == {
        "_local_tensor", "_orig_mod", "_initialize"
    }  # fmt: skip


def private(source: str) -> list[str]:
    """Private names of other libraries in some code."""
    known = {name for taken in names() for text in taken for name in [text.rpartition(".")[2].rpartition(":")[2]]}
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        dotted: list[str] = []
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            if node.attr in known - {"_call_impl", "_compiled_call_impl", "_is_profiler_enabled", "__code__"}:
                found += [node.attr] if node.attr.startswith("_") else []
            elif not isinstance(node.ctx, ast.Store):
                dotted = [ast.unparse(node)]
        for name in dotted:
            library, *below = name.split(".")
            if library in LIBRARIES and below and below[-1].startswith("_") and not below[-1].endswith("__"):
                found.append(name)
    return found


# ---------------------------------------------------------------- forwards that leave no mark


x = torch.linspace(-1, 1, 20).reshape(5, 4)


def forgetful(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
    """A compiler that takes what returns nothing for dead code."""
    for node in reversed(graph.graph.nodes):
        if "noesis" in str(node.target):
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


@pytest.mark.parametrize("eager", [0, 2])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiler_that_loses_what_was_recorded_is_noticed(eager: int) -> None:
    wrapped = noesis.wrap(small(), layers="linear")
    for _ in range(eager):
        wrapped(x)
    assert len(wrapped.trace()) == eager
    compiled = torch.compile(wrapped.observed_model, backend=forgetful)
    for _ in range(3):
        assert torch.equal(compiled(x), small()(x))
    with pytest.warns(noesis.NoesisWarning, match="was compiled, and no forward of what was made of it left a mark"):
        trace = wrapped.trace()
    assert len(trace) == eager
    assert set(trace.unmeasured) == {"0", "2"}
    assert set(wrapped.trace().unmeasured) == {"0", "2"}  # without another warning
    wrapped.reset()
    wrapped(x)
    assert not wrapped.trace().unmeasured


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_forwards_that_are_recorded_are_not_complained_of() -> None:
    wrapped = noesis.wrap(small(), layers="linear")
    with wrapped.paused():
        compiled = torch.compile(wrapped.observed_model, backend="eager")
        compiled(x)
    assert len(wrapped.trace()) == 0
    compiled(x)
    wrapped(x)
    assert wrapped.trace().calls.tolist() == [[1, 1]] * 2


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_is_exported_alone_says_so(strict: bool) -> None:
    if strict and torch.__version__ < (2, 10):  # a TorchVersion
        pytest.skip("a strict export calls the layers there, but not the model itself")
    wrapped = noesis.wrap(small(), layers="linear")
    torch.export.export(wrapped.observed_model, (x,), strict=strict)
    with pytest.warns(noesis.NoesisWarning, match=r"left out \(\d traced by .*export\)"):
        assert len(wrapped.trace()) == 0


def test_a_container_whose_calls_go_elsewhere_says_so() -> None:
    wrapped = noesis.wrap(small(), layers="linear")
    bare = small()
    wrapped.observed_model.__class__ = type(
        "Other", (type(wrapped.observed_model),), {"__call__": lambda _, x: bare(x)}
    )
    wrapped(x)
    with pytest.warns(noesis.NoesisWarning, match="returned 1 times, but was not called as noesis left it"):
        assert len(wrapped.trace()) == 0


def test_a_container_that_was_unwrapped_has_nothing_to_say() -> None:
    wrapped = noesis.wrap(small(), layers="linear")
    wrapped.unwrap()
    wrapped(x)
    assert len(wrapped.trace()) == 0


def test_evidence_of_one_run_is_none_of_the_next() -> None:
    evidence = Evidence(compiled_at=0, passed={"traced": 1}, calls=3, unreached=False)
    assert evidence.left_no_mark(forwards=0, eager=0, measured=False) is not None
    assert evidence.left_no_mark(forwards=1, eager=0, measured=True) is None
    assert evidence.left_no_mark(forwards=1, eager=1, measured=True) is None
    assert evidence.afresh().left_no_mark(forwards=0, eager=0, measured=False) is None
    for of_the_model in (Evidence(unreached=True), Evidence(inside=True)):
        forwards = int(of_the_model.inside)
        assert of_the_model.afresh().left_no_mark(forwards=forwards, eager=forwards, measured=False) is not None


# ---------------------------------------------------------------- what needs a library or a device


def test_tensors_stay_where_they_are_by_the_mark_of_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that came before it was imported."""
    calls: list[tuple[int, bool]] = []
    monkeypatch.setattr(compiling, "_mark", lambda: None)
    monkeypatch.setattr(compiling, "_EARLY", [])
    early, gone = stays(torch.empty(0)), stays(torch.empty(0))
    expected = torch.empty(0)
    torch._dynamo.mark_static_address(expected, guard=False)
    torch._dynamo.mark_static(expected)
    assert early.__dict__.items() <= expected.__dict__.items()
    assert len(early.__dict__) == 2
    number = id(early)
    del gone
    monkeypatch.setattr(compiling, "_mark", lambda: lambda tensor, guard: calls.append((id(tensor), guard)))
    assert not compiling.traced_for_export("")
    late = stays(torch.empty(0))
    assert not compiling.traced_for_export("")
    assert calls == [(number, False), (id(late), False)]


@pytest.mark.parametrize("registry", [None, 7, type("Registry", (), {"get": lambda cls: 7, "register": 7})])
def test_blocks_of_a_diffusers_without_its_registry(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "diffusers.hooks._helpers", type("Helpers", (), {"TransformerBlockRegistry": registry})
    )
    model = small()
    wrapped = noesis.wrap(model, layers="linear")
    assert torch.equal(wrapped(x), small()(x))
    assert wrapped.trace().calls.tolist() == [[1, 1]]
    assert libraries.declared_streams(model[0]) == {}
    libraries.register_block(nn.Linear, nn.Linear)


def test_what_models_declare_may_be_anything() -> None:
    for declared in (None, 7, [], {}, {"other": 1}, {"router_logits": [7, None]}):
        assert (
            libraries.capture_declarations(type("Model", (), {"_can_record_outputs": declared}), "router_logits") == []
        )
    entry = type("Recorder", (), {"target_class": nn.Linear, "index": 3})
    declared = {"router_logits": [nn.ReLU, entry]}
    found = libraries.capture_declarations(type("Model", (), {"_can_record_outputs": declared}), "router_logits")
    assert found == [(nn.ReLU, 1), (nn.Linear, 3)]


def test_a_triton_whose_kernels_cannot_be_launched_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []

    class Function:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
            return lambda *args, **kwargs: launched.append(args) or self

    kernel, cpu = Kernel(Function(), 4), torch.device("cpu")
    monkeypatch.setattr(Kernel, "direct", False)
    for number in range(3):
        kernel.launch(cpu, 0, (), (1, 1), (x,), (number,))
    assert [args[1] for args in launched] == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_and_devices_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert cuda.raw_stream(0) == torch.cuda.current_stream().cuda_stream != 0
        assert cuda.current_device() == torch.cuda.current_device()
        monkeypatch.setattr(cuda, "_stream", lambda: None)
        monkeypatch.setattr(cuda, "_device", lambda: torch.cuda.current_device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_triton_compiles_is_launched_by_itself() -> None:
    from noesis.kernels.dispatch import has_triton

    assert has_triton(torch.device("cuda", 0))
    assert Kernel.direct
