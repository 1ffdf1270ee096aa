"""Every promise on every architecture: what a model computes, what it is, and what is said about it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import noesis
from noesis.layers import batch_of, hidden_index, hidden_state

from . import models
from .entry import Entry, call

pytestmark = pytest.mark.usefixtures("one_thread")

#: Compiled as far as AOTAutograd, one of each kind, and those that eager code computes by another kernel. With
#: NOESIS_ZOO=all Dynamo compiles every other model too, which takes minutes.
COMPILED = [
    *("bert", "vit", "PixArt", "ResNet", "weight_norm", "dataclass", "nested tensor"),
    *("Transformer", "TransformerEncoder"),
]


#: Tried by default; the others with the slow tests.
QUICK = [
    *("gpt2", "llama", "mixtral", "bert", "t5", "vit", "wav2vec2", "clip", "mamba", "SD 1.5", "Flux", "ResNet"),
    *("LSTM", "MultiheadAttention", "parametrized layers", "shared modules", "a batch of nothing"),
    *("None", "dict", "dataclass", "nested tuples", "nested tensor", "sparse tensor", "complex tensor"),
]


@pytest.fixture(
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in models.installed()]
)
def entry(request: pytest.FixtureRequest) -> Entry:
    return models.ALL[request.param]


# ---------------------------------------------------------------- what is compared


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an output, as they come."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for inner in value for tensor in tensors(inner)] if isinstance(value, (tuple, list)) else []


def dense(tensor: Tensor) -> Tensor:
    """The numbers of a tensor of any layout."""
    if tensor.is_nested:
        return tensor.values()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def bits(tensor: Tensor) -> Tensor:
    numbers = dense(tensor.detach())
    numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers
    return numbers.contiguous().reshape(-1).view(torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike in kind and in every bit."""
    kind = [(t.dtype, t.layout, t.is_nested, dense(t).shape, t.requires_grad) for t in (one, other)]
    return kind[0] == kind[1] and torch.equal(bits(one), bits(other))


def assert_same(one: Any, other: Any) -> None:
    one, other = tensors(one), tensors(other)
    assert len(one) == len(other) > 0
    assert all(map(same, one, other))


def seeded(model: Any, entry: Entry) -> Any:
    torch.manual_seed(1)
    return call(model, entry.inputs())


def everything(model: Any, entry: Entry) -> list[Tensor]:
    """Outputs, gradients, buffers and the next random number."""
    output = tensors(seeded(model, entry))
    loss = sum(
        (dense(tensor).abs().double().square().sum() for tensor in output if tensor.requires_grad), torch.zeros(())
    )
    found = [*output, torch.rand(3)]
    if loss.requires_grad:
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found += [torch.zeros(0, 7) if gradient is None else gradient for gradient in gradients]
    return [*found, *model.buffers()]


# ---------------------------------------------------------------- the promises


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_gradients_are_bitwise_equal(entry: Entry, training: bool) -> None:
    bare, observed = (models.model_of(entry).train(training) for _ in range(2))
    wrapped = noesis.wrap(observed, layers="all", per_sample=True, stats=("zeros", "rms"))
    with torch.set_grad_enabled(training or entry.differentiable):
        for _ in range(2):
            assert_same(everything(bare, entry), everything(wrapped, entry))
        assert any(parameter.grad is not None for parameter in bare.parameters()) == torch.is_grad_enabled()


def test_inference_is_bitwise_equal(entry: Entry) -> None:
    bare, observed = (models.model_of(entry) for _ in range(2))
    wrapped = noesis.wrap(observed, layers="all")
    with torch.inference_mode():
        assert_same(seeded(bare, entry), seeded(wrapped, entry))


def facts(model: nn.Module) -> dict[str, Any]:
    """What unwrapping has to give back."""
    return {
        name: (module, type(module), set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def test_the_model_does_not_notice_and_is_given_back(entry: Entry) -> None:
    model = models.model_of(entry)
    before_any = seeded(model, entry)  # a model may keep things from its first forward
    before, keys, parameters = facts(model), list(model.state_dict()), dict(model.named_parameters())
    wrapped = noesis.wrap(model, layers="all")
    seeded(wrapped, entry)
    assert list(model.state_dict()) == keys == list(wrapped.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert len(dict(model.named_parameters())) == len(parameters)
    for name, (module, cls, *_) in before.items():
        assert model.get_submodule(name) is module
        assert isinstance(module, cls)
        named = type(module)
        assert (named.__name__, named.__qualname__, named.__module__) == (
            cls.__name__,
            cls.__qualname__,
            cls.__module__,
        )
    assert all(isinstance(model.get_submodule(name), noesis.Observed) for name in wrapped.observed_layers)
    assert wrapped.unwrap() is model
    assert facts(model) == before
    assert_same(before_any, seeded(model, entry))


def test_every_layer_is_measured_or_named(entry: Entry) -> None:
    """Hooks on a second copy tell what ran and how many numbers came of it."""
    hooked, model = (models.model_of(entry).train() for _ in range(2))
    elements: dict[str, int] = {}
    ran: set[str] = set()

    def count(name: str, stream: int | None, output: Any) -> None:
        ran.add(name)
        hidden = hidden_state(output, stream)
        if hidden is not None and not hidden.is_nested and hidden.layout == torch.strided:
            elements[name] = elements.get(name, 0) + hidden.numel()

    wrapped = noesis.wrap(model, layers="all")
    for name in wrapped.observed_layers:
        module = hooked.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: count(name, hidden_index(module), output))
    seeded(hooked, entry)
    seeded(wrapped, entry)
    trace = wrapped.trace()
    assert set(trace.never_ran) == set(trace.layers) - ran
    assert set(trace.unmeasured) == ran - set(elements)
    total = dict(zip(trace.layers, (trace["count"] + trace["nonfinite"])[0], strict=True))
    assert {name: total[name] for name in elements} == elements
    assert all(name in repr(trace) for name in [*trace.never_ran, *trace.unmeasured])


def test_blocks_are_what_one_would_call_so(entry: Entry) -> None:
    wrapped = noesis.wrap(models.model_of(entry), layers="blocks")
    assert models.kinds(wrapped.observed_layers) == entry.blocks


@pytest.mark.slow
def test_a_deep_copy_is_observed_by_itself(entry: Entry) -> None:
    model = models.model_of(entry)
    wrapped = noesis.wrap(model, layers="all")
    want = seeded(model, entry)
    twin = copy.deepcopy(model)
    assert type(twin).__name__ == type(model).__name__
    other = noesis.wrap(twin, layers="all")  # a handle on the copy
    assert_same(want, seeded(twin, entry))
    assert (len(wrapped.trace()), len(other.trace())) == (1, 2)
    other.unwrap()
    assert not any(isinstance(module, noesis.Observed) for module in twin.modules())
    assert all(isinstance(model.get_submodule(name), noesis.Observed) for name in wrapped.observed_layers)


@pytest.mark.slow
def test_save_pretrained_and_back(entry: Entry, tmp_path) -> None:
    model = models.model_of(entry)
    if not hasattr(model, "save_pretrained"):
        pytest.skip("a model without save_pretrained")
    cls, want = type(model), seeded(model, entry)
    noesis.wrap(model, layers="all").save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert type(again) is cls
    assert not any(isinstance(module, noesis.Observed) for module in again.modules())
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert_same(want, seeded(again.eval(), entry))


@pytest.mark.slow
def test_codebooks_keep_vectors_of_every_sample(entry: Entry) -> None:
    bare, observed = (models.model_of(entry) for _ in range(2))
    wrapped = noesis.wrap(observed, layers="blocks", codebook=noesis.Codebook(), logits=entry.logits)
    with torch.no_grad():
        assert_same(seeded(bare, entry), seeded(wrapped, entry))
    channels, trace, forwards = wrapped._channels(), wrapped.trace(), wrapped._forwards()
    inputs = entry.inputs()
    batch = (batch_of((), inputs) if isinstance(inputs, dict) else batch_of(inputs, {})).size
    kept = {name: channel.kept(forwards) for name, channel in channels.layers.items()}
    kept = {name: found.vectors for name, found in kept.items() if found is not None}
    assert all(len(vectors) == batch and vectors.isfinite().all() for vectors in kept.values())
    left_out = {*trace.unmeasured, *trace.never_ran, *channels.uncoded}
    assert set(channels.layers) == set(kept) | left_out
    assert not set(kept) & left_out
    if entry.coded:
        assert kept
    if entry.logits is not None:
        assert channels.doubt is not None
        assert len(channels.doubt.kept(forwards).vectors) == batch


# ---------------------------------------------------------------- torch.compile


def graphs(model: Any, entry: Entry, fullgraph: bool, backend: str) -> tuple[int, list[Tensor]]:
    """How many graphs two forwards take, and what comes out."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    with torch.no_grad():
        outputs = [tensor for _ in range(2) for tensor in tensors(seeded(compiled, entry))]
    return counter.frame_count, outputs


def compiles(entry: Entry, bare: nn.Module, backend: str = "aot_eager") -> str:
    """Has a model compiled wrapped and bare, and says what came of it, for the table."""
    wrapped, eager = (noesis.wrap(copy.deepcopy(bare), layers="all") for _ in range(2))
    try:
        whole, (count, got) = True, graphs(wrapped.observed_model, entry, True, backend)
    except torch._dynamo.exc.TorchDynamoException:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            graphs(bare, entry, True, backend)
        wrapped = noesis.wrap(copy.deepcopy(bare), layers="all")
        whole, (count, got) = False, graphs(wrapped.observed_model, entry, False, backend)
    if whole and count == 1 and backend == "eager":  # no model takes less, and this backend computes as eager code does
        with torch.no_grad():
            bare_count, want = 1, [tensor for _ in range(2) for tensor in tensors(seeded(bare, entry))]
    else:
        bare_count, want = graphs(bare, entry, whole, backend)
    assert not whole or count == bare_count
    assert_same(want, got)
    with torch.no_grad():
        seeded(eager, entry)
    trace, expected = wrapped.trace(), eager.trace()
    assert len(trace) == 2
    for step in trace["count"]:  # 0 where nothing could be measured
        np.testing.assert_array_equal(np.nan_to_num(step), np.nan_to_num(expected["count"][0]))
    if not whole:
        return f"the bare model breaks too ({bare_count} graphs, {count} observed)"
    return "one graph" if count == 1 else f"one graph, {count} times"


def _marked() -> list[Any]:
    everything = os.environ.get("NOESIS_ZOO") == "all"
    return [pytest.param(name) for name in models.installed() if everything or name in COMPILED]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what Bloom does
@pytest.mark.parametrize("name", _marked())
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_where_the_bare_model_has_one(name: str) -> None:
    """Dynamo makes the graphs; AOTAutograd, behind it, has one model of each kind."""
    entry = models.ALL[name]
    compiles(entry, models.short(entry), "aot_eager" if name in COMPILED else "eager")


# ---------------------------------------------------------------- the page


def test_the_page_names_every_model() -> None:
    from .table import PAGE, row

    written = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    # Not what was counted and compiled there: the tests above try that.
    wanted = [row(entry, "", "").rsplit(" | ", 2)[0] for entry in models.ALL.values()]
    assert [line.rsplit(" | ", 2)[0] for line in written] == wanted
