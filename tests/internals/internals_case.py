"""What noesis does on a torch that lacks a name, or has another thing under it: run in a process of its own per name.

    python tests/internals/internals_case.py missing

Prints a JSON object per case: the names that were taken away, and what went wrong.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.export
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

INTERNALS = Path(__file__).parents[2] / "src" / "noesis" / "internals"
#: What is put in the place of names, of several things in turn.
PLACES: dict[str, list[Any]] = {"missing": [None], "other": [7, lambda *args, **kwargs: "something else"]}
#: Processes at a time.
SIDE_BY_SIDE = 2
#: Seconds that a process may take.
LONGEST = 120
#: Names of other libraries, which have tests of their own; CUDA's are looked up where there is a device.
ELSEWHERE = {
    *("TransformerBlockRegistry", "get", "register", "return_hidden_states_index"),
    *("_can_record_outputs", "ALL_ATTENTION_FUNCTIONS", "get_interface"),
}


@cache
def names() -> list[tuple[str, ...]]:
    """Every name that `noesis.internals` looks up, those together that stand in for each other."""
    found: list[tuple[str, ...]] = []
    for path in sorted(INTERNALS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            texts = tuple(
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )
            if node.func.id in ("look_up", "attribute") and texts and not ELSEWHERE & set(texts):
                found.append(texts)
    return [texts for texts in dict.fromkeys(found) if not texts[0].startswith("torch._C:_cuda")]


class WithoutNames:
    """Imports `noesis.internals.lookup` as it is on a torch where names are gone or mean something else."""

    def __init__(self, taken: tuple[str, ...], place: Any) -> None:
        self.taken, self.place = taken, place
        self.used = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "noesis.internals.lookup":
            return None
        spec = importlib.util.spec_from_file_location(name, INTERNALS / "lookup.py")
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.resolve = self.instead(module.resolve, 0)
            module.attribute = self.instead(module.attribute, 1)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def instead(self, original: Callable[..., Any], named: int) -> Callable[..., Any]:
        def look(*args: Any) -> Any:
            if args[named] not in self.taken:
                return original(*args)
            self.used = True
            return self.place

        return look


# ---------------------------------------------------------------- what is tried


class Net(nn.Module):
    """Three layers, the second of which may be recomputed."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(x) if self.recompute is None else checkpoint(self.second, x, use_reentrant=self.recompute)
        return self.third(x.sin())


x = torch.linspace(-1, 1, 20).reshape(5, 4)
LAYERS = ["first", "second", "third"]


def train(model: nn.Module) -> list[Tensor]:
    """Outputs and gradients."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two lists of tensors are the same, bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def means() -> list[float]:
    """The mean of each layer's output, from the bare model."""
    found, model = [], Net()
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out: found.append(out.mean().item()))
    with torch.no_grad():
        model(x)
    return found


def right(trace: Any, steps: int, *, said: bool = False) -> bool:
    """Whether each step has the rows that it should have; with `said`, or every layer is reported by name."""
    if said and set(trace.unmeasured) == set(LAYERS):
        return True
    close = [abs(a - b) < 1e-5 for row in trace["mean"] for a, b in zip(row, means(), strict=True)]
    return len(trace) == steps and trace.calls.tolist() == [[1, 1, 1]] * steps and all(close)


def reading(wrapped: Any) -> Any:
    """A trace; a warning that something left no mark is one way of saying so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrapped.trace()


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def eager(noesis: Any) -> Iterator[tuple[str, bool]]:
    model = Net()
    wrapped = noesis.wrap(model, layers="linear")
    yield "outputs and gradients are bitwise equal", equal(train(model), train(Net()))
    yield "rows are right", right(reading(wrapped), 1)
    with wrapped.paused():
        yield "outputs are equal while paused", equal(train(model), train(Net()))
    with Watching(), torch.device("cpu"):
        yield "outputs are equal under modes", torch.equal(model(x), Net()(x))
    yield "rows are right under modes, and there are none of pauses", right(reading(wrapped), 2)
    one = torch.func.vmap(model)(x[:, None])
    yield "outputs are equal under vmap", torch.equal(one, torch.func.vmap(Net())(x[:, None]))
    yield "what vmap gives is named", set(reading(wrapped).unmeasured) == set(LAYERS)
    wrapped.unwrap()
    yield "classes come back", type(model) is Net and type(model.first) is nn.Linear


def recomputed(noesis: Any) -> Iterator[tuple[str, bool]]:
    for reentrant in (True, False):
        model = Net(reentrant)
        wrapped = noesis.wrap(model, layers="linear", gradients=True)
        yield "recomputing changes nothing", equal(train(model), train(Net(reentrant)))
        yield "what is recomputed is no call", right(reading(wrapped), 1)
        found = wrapped.gradients()
        named = set(found.never_ran) <= set(found.unmeasured)
        yield "gradients are there or named", named and found.calls.max() <= 1 and found.calls.sum() >= 2
        wrapped.unwrap()
        model = Net(reentrant)
        with noesis.capture(model, "linear") as acts:
            train(model)
        yield "what is recomputed is kept once", [len(calls) for calls in acts.values()] == [1, 1, 1]


def traced(noesis: Any) -> Iterator[tuple[str, bool]]:
    model = Net()
    wrapped = noesis.wrap(model, layers="linear")
    graphs = [torch.fx.symbolic_trace(each).graph for each in (model, Net())]
    yield "torch.fx sees the bare model", len({str([node.op for node in graph.nodes]) for graph in graphs}) == 1
    script = torch.jit.trace(model, x, check_trace=False)
    yield "torch.jit sees the bare model", torch.equal(script(x), Net()(x))
    yield "tracing leaves no rows", len(reading(wrapped)) == 0
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        yield "an export has no operation of noesis", "noesis" not in str(program.graph)
        yield "an export computes the same", torch.equal(program.module()(x), Net()(x))
    yield "exporting leaves no rows", len(reading(wrapped)) == 0


def compiled(noesis: Any) -> Iterator[tuple[str, bool]]:
    torch._dynamo.reset()
    bare = train(torch.compile(Net(), backend="eager"))
    shell = torch.compile(Net(), backend="eager", fullgraph=True)
    shell(x)
    wrapped = noesis.wrap(shell, layers="linear", gradients=True)
    yield "compiled, then wrapped, nothing changes", equal(train(shell), bare)
    shell(x)
    yield "compiled, then wrapped, rows are right or said to be missing", right(reading(wrapped), 2, said=True)
    torch._dynamo.reset()
    wrapped = noesis.wrap(Net(), layers="linear")
    shell = torch.compile(wrapped.observed_model, backend="eager", fullgraph=True)
    yield "wrapped, then compiled, nothing changes", equal(train(shell), bare)
    shell(x)
    yield "wrapped, then compiled, rows are right", right(reading(wrapped), 2)
    wrapped.unwrap()


class Broken(Net):
    """The same, in several graphs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.third(self.second(x).sin())


def broken(noesis: Any) -> Iterator[tuple[str, bool]]:
    if torch.__version__.startswith("2.6."):  # which loses rows there
        return
    torch._dynamo.reset()
    wrapped = noesis.wrap(Broken(), layers="linear", gradients=True)
    shell = torch.compile(wrapped.observed_model, backend="eager")
    yield "where graphs break, nothing changes", equal(train(shell), train(Net()))
    shell(x)
    yield "where graphs break, rows are right", right(reading(wrapped), 2)
    found = wrapped.gradients()
    yield "gradients are there or named", set(found.never_ran) <= set(found.unmeasured)


def spread(noesis: Any) -> Iterator[tuple[str, bool]]:
    folder = tempfile.TemporaryDirectory()
    dist.init_process_group("gloo", init_method=f"file://{folder.name}/group", rank=0, world_size=1)
    wrapped = noesis.wrap(Net(), layers="linear")
    wrapped(x)
    yield "ranks are merged", right(wrapped.trace(group=dist.group.WORLD, timeout=20), 1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return DTensor.from_local(x, mesh, [Replicate()])

    model = nn.Sequential(Spread())
    wrapped = noesis.wrap(model, layers="all")
    model(x)
    yield "a DTensor is measured by its part", abs(wrapped.trace()["std"][0, 0] - x.std().item()) < 1e-6
    folder.cleanup()


def problems(taken: tuple[str, ...], place: Any) -> list[str]:
    """What goes wrong on a torch without these names."""
    finder = WithoutNames(taken, place)
    sys.meta_path.insert(0, finder)
    from noesis.kernels import dispatch as kernels

    kernels.by_numba = lambda name: None  # type: ignore[assignment]  # it would compile for seconds in each process
    import noesis

    found: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (eager, recomputed, traced, compiled, broken, spread):
            try:
                found += [f"not so: {what}" for what, holds in part(noesis) if not holds]
            except Exception as error:  # noqa: PERF203  there are few parts
                found.append(f"{part.__name__}: {type(error).__name__}: {str(error)[:300]}")
    if taken and not finder.used:
        found.append("nothing asked for this name")
    return found


def begin(taken: tuple[str, ...], place: Any) -> tuple[tuple[str, ...], int, int]:
    """The same in a fork, which has not imported noesis."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        with os.fdopen(writable, "w") as out:
            json.dump(problems(taken, place), out)
        os._exit(0)  # with the process group, which gloo was seen to wait for ever to destroy
    os.close(writable)
    return taken, child, readable


def end(taken: tuple[str, ...], child: int, readable: int) -> None:
    """Wait for a fork, and print what it found."""
    with os.fdopen(readable) as told:
        text = told.read()
    os.waitpid(child, 0)
    found: list[str] = json.loads(text) if text else ["the process died"]
    print(json.dumps({"taken": taken, "problems": found}), flush=True)


if __name__ == "__main__":
    assert "noesis" not in sys.modules
    with torch.no_grad():  # what is imported here, children need not import
        torch.compile(Net(), backend="eager")(x)
        for strict in (True, False):
            torch.export.export(Net(), (x,), strict=strict)
    places, running = PLACES[sys.argv[1]], []
    for number, taken in enumerate([(), *names()]):
        running.append(begin(taken, places[number % len(places)]))
        if len(running) == SIDE_BY_SIDE:
            end(*running.pop(0))
    for each in running:
        end(*each)
