"""What noesis does not see, or not as one might expect: one test per row of the first table of docs/limitations.md."""

from __future__ import annotations

import ast
import multiprocessing
import pickle
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn

import noesis
from helpers.checkout import ROOT
from helpers.models import Returns


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def observed_once(value: Callable[[Tensor], Any]) -> noesis.Trace:
    """The trace of one forward of a layer that returns `value(x)`."""
    wrapped = noesis.wrap(nn.Sequential(Returns(value)), layers="all")
    wrapped(torch.tensor([[1.0, 2.0]]))
    return wrapped.trace()


# ---------------------------------------------------------------- layers that are not called


def test_attention_reads_out_proj_without_calling_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    wrapped = noesis.wrap(Net(), layers="all")
    wrapped(torch.randn(2, 3, 8))
    assert wrapped.trace().never_ran == ["attention.out_proj"]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_the_fast_path_of_transformer_encoders_calls_nothing_inside() -> None:
    wrapped = noesis.wrap(encoder(), layers="all")
    with torch.no_grad():
        wrapped(torch.randn(2, 3, 8))
    ran = [name for name in wrapped.observed_layers if name not in wrapped.trace().never_ran]
    assert ran == ["layers.0", "layers.1"]
    wrapped.reset()
    wrapped(torch.randn(2, 3, 8))  # where gradients are recorded there is no fast path
    assert wrapped.trace().never_ran == ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]


def test_capture_keeps_transformer_encoders_off_their_fast_path() -> None:
    model = encoder()
    with torch.no_grad(), noesis.capture(model, "all") as acts:
        model(torch.randn(2, 3, 8))
    assert acts.never_ran == ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]


def test_forward_called_by_hand_is_not_seen() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    model[0].forward(torch.ones(1, 4))
    assert wrapped.trace().never_ran == ["0", "1"]
    wrapped.forward(torch.ones(1, 4))  # runs the layers, but begins no step
    wrapped.forward(torch.ones(1, 4))
    with pytest.warns(noesis.NoesisWarning, match=r"^Layers ran by themselves \(layer '0' 2 times\), and no forward"):
        assert wrapped.trace().calls.tolist() == [[2, 2]]


def test_calls_inside_a_backward_pass_are_taken_for_recomputation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.of_gradients = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.used(x)
            y.register_hook(self.of_gradients)
            return y

    wrapped = noesis.wrap(Net(), layers="linear")
    wrapped(torch.ones(1, 4)).sum().backward()
    assert wrapped.trace().never_ran == ["of_gradients"]


# ---------------------------------------------------------------- steps


def test_single_layers_that_are_called_alone_give_one_open_step(tmp_path: Path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

        def decode(self, z: Tensor) -> Tensor:
            return self.decoder(z)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encoder(x))

    wrapped = noesis.wrap(Autoencoder(), layers="linear")
    for _ in range(3):
        wrapped.decode(torch.ones(1, 2))
    with pytest.warns(
        noesis.NoesisWarning, match=r"Layers ran by themselves \(layer 'decoder' 3 times\).*Wrap the module"
    ):
        trace = wrapped.trace()
    assert trace.steps.tolist() == [0]
    assert trace.calls.tolist() == [[0, 3]]
    assert trace.soulprint().layers == ["decoder"]
    wrapped(torch.ones(1, 4))  # the next forward of the root closes it, and is merged with it
    assert wrapped.trace().calls.tolist() == [[1, 4]]
    for look in (noesis.Alarms(wrapped).check, lambda: wrapped.log_to(tmp_path / "run.csv")):
        wrapped.reset()
        wrapped.decode(torch.ones(1, 2))
        with pytest.warns(noesis.NoesisWarning, match=r"Layers ran by themselves \(layer 'decoder' 1 time\)"):
            assert not look()


def test_threads_share_the_step_of_one_wrapped_model() -> None:
    first_is_in, go_on = threading.Event(), threading.Event()

    def wait(x: Tensor) -> Tensor:
        if len(x) == 3:  # the batch of the first thread
            first_is_in.set()
            assert go_on.wait(60)
        return x

    wrapped = noesis.wrap(nn.Sequential(Returns(wait), nn.Identity()), layers="all")
    first = threading.Thread(target=lambda: wrapped(torch.ones(3, 2)))
    first.start()
    assert first_is_in.wait(60)
    wrapped(torch.ones(1, 2))
    go_on.set()
    first.join()
    assert wrapped.trace()["count"].tolist() == [[0, 0], [2, 2], [6, 6]]  # the first thread's rows miss its step


def test_the_ring_keeps_the_latest_steps_and_totals_of_all() -> None:
    wrapped = noesis.wrap(small(), layers="all", capacity=2)
    for _ in range(5):
        wrapped(torch.ones(3, 4))
    trace = wrapped.trace()
    assert (trace.steps.tolist(), trace.dropped_steps) == ([3, 4], 3)
    assert trace.totals[:, 0].tolist() == [5 * 12, 5 * 12]
    assert trace.soulprint().steps == 5


def test_nothing_of_a_paused_forward_is_kept() -> None:
    wrapped = noesis.wrap(small(), layers="all")
    x = torch.ones(1, 4)
    wrapped(x)
    before = wrapped.trace()
    with wrapped.paused():
        wrapped(100 * x)
        assert (wrapped.trace().totals == before.totals).all()
    wrapped(x)
    trace = wrapped.trace()
    assert trace.steps.tolist() == [0, 1]  # not counted either: there is no gap
    assert (trace.values[1] == before.values[0]).all()


def test_calls_of_one_step_are_one_row() -> None:
    act = nn.ReLU()
    wrapped = noesis.wrap(nn.Sequential(act, nn.Linear(4, 4), act), layers="all")
    wrapped(torch.ones(1, 4))
    assert wrapped.observed_layers == ["0", "1"]  # a module with two names goes by the first
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[2, 1]]
    assert trace.order.tolist() == [[1, 2]]  # where it ran first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_each_process_has_a_trace_of_its_own() -> None:
    noesis.wrap(small(), layers="linear")(torch.ones(1, 4))  # what Numba compiles here, children have
    context = multiprocessing.get_context("fork")  # of spawned ones, `contexts` has tests
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_run_rank, args=(rank, queue)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert sorted(queue.get() for _ in ranks) == [(0, 4), (1, 8)]


def _run_rank(rank: int, queue: Any) -> None:
    """A batch of `rank + 1` in one process of many, told apart by what its trace counts."""
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    wrapped = noesis.wrap(small(), layers="linear")
    wrapped(torch.ones(rank + 1, 4))
    queue.put((rank, int(wrapped.trace()["count"].item())))


# ---------------------------------------------------------------- samples


class TimeFirst(nn.Module):
    """An LSTM that wants time first, in a model whose batch comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # x: (B, T, 4)
        hidden, _ = self.lstm(x.transpose(0, 1))  # (T, B, 6)
        return self.head(hidden[-1])


def test_layers_without_the_batch_in_front_have_no_rows_per_sample() -> None:
    wrapped = noesis.wrap(TimeFirst(), per_sample=True, layers="all")
    for length in (5, 4):  # 4 steps of time are a multiple of the batch of 2
        wrapped.reset()
        wrapped(torch.randn(2, length, 4))
        with pytest.warns(noesis.NoesisWarning, match="There are no rows per sample of lstm"):
            trace = wrapped.trace()
        assert trace["count"].tolist() == [[2 * length * 6, 4]]
        assert [sample.soulprint().layers for sample in trace.samples] == [["head"], ["head"]]


def test_as_many_as_the_batch_in_front_are_taken_for_the_batch() -> None:
    model = TimeFirst()
    wrapped = noesis.wrap(model, per_sample=True, layers="all")
    x = torch.randn(3, 3, 4)  # as many steps of time as samples
    wrapped(x)
    hidden = model.lstm(x.transpose(0, 1))[0]
    for sample, mixed in zip(wrapped.trace().samples, hidden, strict=True):
        assert sample["mean"][0, 0] == pytest.approx(mixed.mean().item(), rel=1e-5)  # a moment of all samples


# ---------------------------------------------------------------- tensors


class Labelled(Tensor):
    """A tensor subclass that computes in its own way, as DTensor does."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda x: x.to_sparse(), "a tensor of layout torch.sparse_coo"),
        (lambda x: torch.nested.nested_tensor([x], layout=torch.jagged), "a nested tensor"),
        (lambda x: x.long(), "no floating tensor"),
        (lambda x: torch.complex(x, x), "no floating tensor"),
        (lambda x: None, "no floating tensor"),
        (lambda x: x.to("meta"), "a tensor without data of its own"),
        (lambda x: x.as_subclass(Labelled), "a Labelled"),
    ],
)
def test_tensors_that_cannot_be_measured_are_named(value: Callable[[Tensor], Any], reason: str) -> None:
    trace = observed_once(value)
    assert trace.unmeasured["0"].startswith(reason)
    assert f"not measured: 0 ({reason}" in repr(trace)
    assert trace.never_ran == []


def test_inside_torch_func_nothing_is_measured() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    torch.func.vmap(model)(torch.ones(3, 4))
    trace = wrapped.trace()
    assert len(trace) == 1
    assert list(trace.unmeasured) == ["0", "1"]
    assert "torch.func" in trace.unmeasured["0"]


def test_one_tensor_of_an_output_is_measured() -> None:
    value = {"mask": torch.ones(2) > 0, "first": torch.ones(2), "second": torch.zeros(2)}
    assert observed_once(lambda _: value)["mean"].item() == 1.0


def test_rows_are_float32() -> None:
    trace = observed_once(lambda x: x.double() * 1e39)
    assert trace["max"].item() == float("inf")
    assert trace["nonfinite"].item() == 0  # the output itself is finite


# ---------------------------------------------------------------- the model changes


def test_adapters_added_after_wrapping_are_left_out() -> None:
    peft = pytest.importorskip("peft")
    model, x = small(), torch.ones(1, 4)
    wrapped = noesis.wrap(model, layers="linear")
    base = model[0](x)
    wrapped.reset()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], r=2), model)
    nn.init.ones_(model[0].lora_B["default"].weight)
    whole = model[0](x)
    assert not torch.allclose(base, whole)
    trace = wrapped.trace()
    assert trace["mean"].item() == pytest.approx(base.mean().item())
    assert trace.unmeasured["0"].startswith("another module took its place after wrapping")
    wrapped.unwrap()
    again = noesis.wrap(model, layers="linear")  # wrapped after the adapter: one layer, with it
    again(x)
    assert again.observed_layers == ["0"]
    assert again.trace()["mean"].item() == pytest.approx(whole.mean().item())


def test_a_module_put_in_place_of_an_observed_one_is_not_observed() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    model[0] = nn.Linear(4, 4)
    wrapped(torch.ones(1, 4))
    assert "not measured: 0 (another module took its place after wrapping" in repr(wrapped.trace())


def test_a_class_given_after_wrapping_stays_at_unwrap() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    nn.utils.parametrizations.weight_norm(model[0])
    wrapped(torch.ones(1, 4))
    assert wrapped.trace().calls.tolist() == [[1, 1]]  # observed all the same
    given = type(model[0])
    wrapped.unwrap()
    assert type(model[0]) is given
    assert type(model[1]) is nn.ReLU
    model(torch.ones(1, 4))
    assert wrapped.trace().calls.tolist() == [[1, 1]]  # and no longer
    again = noesis.wrap(model, layers="all")
    model(torch.ones(1, 4))
    assert again.trace().calls.tolist() == [[1, 1]]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated since 2.13
def test_script_modules_and_lazy_modules_are_refused() -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"0 \(RecursiveScriptModule\) is a ScriptModule.*before scripting"):
        noesis.wrap(nn.Sequential(scripted), layers="all")
    with pytest.raises(RuntimeError, match=r"0 \(LazyLinear\) has no parameters yet.*Run the model once"):
        noesis.wrap(nn.Sequential(nn.LazyLinear(2)), layers="all")


# ---------------------------------------------------------------- compiled code


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_denoisers_that_are_compiled_know_the_guidance_branch() -> None:
    pytest.importorskip("diffusers")
    from helpers.pipelines import build, call

    branches = []
    for compiled in (False, True):
        pipe = build("pixart")
        wrapped = noesis.wrap(pipe)
        if compiled:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        call("pixart", pipe, steps=2)
        trace = wrapped.trace()
        branches.append(trace.branches)
        assert trace.timesteps.tolist() == [500.0, 0.0]
    assert branches == [["uncond+cond"] * 2] * 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_inner_module_of_a_compiled_model_begins_no_step() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    calls = []
    for wrap_the_inner in (True, False):
        model = Net()
        compiled = torch.compile(model, backend="eager")
        wrapped = noesis.wrap(model if wrap_the_inner else compiled, layers="linear")
        compiled(torch.ones(1, 4))
        compiled(torch.ones(1, 4))
        with pytest.warns(noesis.NoesisWarning, match="Layers ran") if wrap_the_inner else nullcontext():
            calls.append(wrapped.trace().calls.tolist())
    assert calls == [[[2]], [[1], [1]]]


@pytest.mark.filterwarnings("ignore:.*quantiz")  # torch's own are deprecated
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_layers_that_cannot_be_measured_are_reported_as_never_run() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    wrapped = noesis.wrap(nn.Sequential(nn.Linear(4, 4), Counts()), layers="all")
    torch.compile(wrapped.observed_model, backend="aot_eager")(torch.ones(1, 4))
    trace = wrapped.trace()
    assert (trace.never_ran, trace.unmeasured) == (["1"], {})


def test_a_wrap_with_a_lambda_cannot_be_pickled() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all", output=lambda output: output)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(model)
    wrapped.unwrap()
    pickle.dumps(model)


def test_a_model_that_calls_itself_begins_a_step_each_time() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self.layer(self(x, again=False) if again else x)

    wrapped = noesis.wrap(Twice(), layers="all")
    wrapped(torch.ones(1))
    assert wrapped.trace().calls.tolist() == [[0], [1], [1]]  # outer, inner, and what follows the inner one


def test_every_is_the_containers() -> None:
    model = small()
    model.every = 7
    wrapped = noesis.wrap(model, layers="all")
    wrapped.every = 2
    assert (wrapped.every, wrapped.observed_model.every) == (2, 7)


def gradients(model: nn.Module, emulate: bool) -> list[Tensor]:
    """Output and gradients of a forward and backward pass, compiled by Inductor."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(emulate_precision_casts=emulate):
        torch.manual_seed(1)
        x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
        output = torch.compile(model, fullgraph=True)(x)
        output.float().square().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.slow
def test_fused_low_precision_code_rounds_where_it_is_looked_into() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.SiLU(), nn.Linear(256, 64)).bfloat16()

    for emulate in (False, True):
        bare, observed = model(), noesis.wrap(model(), layers="all").model
        pairs = list(zip(gradients(bare, emulate), gradients(observed, emulate), strict=True))
        assert all(torch.equal(one, other) for one, other in pairs) == emulate
        assert all((one - other).abs().max() <= 0.02 * one.abs().max() for one, other in pairs)


# ---------------------------------------------------------------- the table


#: The first cells of each table of the page, and the file or folder of its tests unless a row names another.
TABLES = {("limitation", "what happens"): "test_limitations.py", ("context", "what to know"): "contexts"}


def rows_of_the_page() -> list[tuple[str, str, str]]:
    """(first cell, test, file or folder of the table) of every row of the tables in docs/limitations.md."""
    lines = (ROOT / "docs" / "limitations.md").read_text(encoding="utf-8").splitlines()
    rows: list[tuple[str, str, str]] = []
    found = []
    for line in lines:
        if not line.startswith("| "):
            continue
        first, second, test = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if test == "test":
            found.append((first, second))
        else:
            rows.append((first, test, TABLES[found[-1]]))
    assert found == list(TABLES)
    return rows


@cache
def names_of_tests(place: str) -> set[str]:
    """Of a file, or of all in a folder."""
    path = ROOT / "tests" / place
    files = path.glob("*.py") if path.is_dir() else [path]
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_names_its_test_and_every_test_its_row() -> None:
    named: Counter[tuple[str, str]] = Counter()
    for first, test, file in rows_of_the_page():
        if test.startswith("not tested: "):
            assert len(test) > len("not tested: "), first
            continue
        found = re.fullmatch(r"`(?:tests/([\w/]+(?:\.py)?)::)?(test_\w+)`", test)
        assert found, f"{first}: {test}"
        named[found[1] or file, found[2]] += 1
    for file, name in named:
        assert name in names_of_tests(file), f"{file} has no {name}"
    for file in TABLES.values():
        here = names_of_tests(file) - {"test_every_row_names_its_test_and_every_test_its_row"}
        rows = Counter({name: count for (where, name), count in named.items() if where == file})
        assert rows == Counter(dict.fromkeys(here, 1)), file
