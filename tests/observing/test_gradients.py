"""`wrap(..., gradients=True)`: rows of the gradients by what layers return, and training that is bitwise the same."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import noesis


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.ReLU(inplace=True),
            nn.Linear(3 * width, width),
        )
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.act(self.up(self.norm(x)))))


class Net(nn.Module):
    """Convolution, attention, words, an activation in place; parts may be recomputed."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        for layer in self.layers:
            x = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return self.head(x.mean(1))


def batches(steps: int, size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        yield torch.randint(11, (size, 6), generator=generator), torch.randint(3, (size,), generator=generator)


def train(model: nn.Module, steps: int = 3, context: Callable[[], object] | None = None) -> list[Tensor]:
    """Losses, parameters, gradients and the random numbers that come next."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for ids, labels in batches(steps):
        with context() if context else torch.enable_grad():
            loss = nn.functional.cross_entropy(model(ids).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [*losses, *model.parameters(), *gradients, torch.rand(2)]


def wanted(model: nn.Module, steps: int = 3) -> list[dict[str, Tensor]]:
    """The gradients of each step by name, found by hooks on a bare model."""
    found: list[dict[str, Tensor]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            x = output[0] if isinstance(output, tuple) else output
            if x.requires_grad:
                x.register_hook(lambda gradient: found[-1].__setitem__(name, gradient.double().clone()))

        return hook

    for name, module in list(model.named_modules())[1:]:
        module.register_forward_hook(look(name))
    model.register_forward_pre_hook(lambda *_: found.append({}))
    train(model, steps)
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("context", [None, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
@pytest.mark.parametrize("recompute", [None, False, True])
def test_training_is_bitwise_the_same(context, recompute) -> None:
    bare = train(Net(recompute), context=context)
    wrapped = noesis.wrap(Net(recompute), layers="all", gradients=True, per_sample=True, stats=["zeros", "rms"])
    assert same(bare, train(wrapped, context=context))
    assert (wrapped.gradients()["count"] > 0).any(0).sum() >= 14


def test_rows_are_those_of_the_gradients() -> None:
    want = wanted(Net())
    wrapped = noesis.wrap(Net(), layers="all", gradients=True, stats=["zeros", "rms"])
    train(wrapped)
    found = wrapped.gradients()
    assert found.layers == wrapped.trace().layers
    assert found.steps.tolist() == [0, 1, 2]
    assert set(found.never_ran) == set(found.layers) - set(want[0])
    # Before 2.15 a Linear of 3-d returns a view, which the activation behind it changes in place.
    views = nn.Linear(2, 2)(torch.ones(1, 1, 2))._is_view()
    assert set(found.never_ran) == {"attention.out_proj", *(["layers.0.up", "layers.1.up"] if views else [])}
    for step, gradients in enumerate(want):
        for name, x in gradients.items():
            expected = [x.numel(), x.mean(), x.std(), x.abs().mean(), x.min(), x.max(), 0, (x == 0).sum()]
            expected.append(x.square().mean().sqrt())
            got = found.layer(name)[step]
            assert got == pytest.approx([float(value) for value in expected], rel=1e-5, abs=1e-8), (step, name)
    assert (found.calls <= 1).all()
    last_first = found.order[0][[found.layers.index(name) for name in ("head", "layers.1", "layers.0", "words")]]
    assert sorted(last_first) == last_first.tolist()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_their_gradients(reentrant: bool) -> None:
    plain, recomputed = (noesis.wrap(Net(recompute), layers="all", gradients=True) for recompute in (None, reentrant))
    for wrapped in (plain, recomputed):
        wrapped.eval()  # without dropout, whose numbers are drawn anew
        train(wrapped, steps=1)
    want, found = plain.gradients(), recomputed.gradients()
    np.testing.assert_allclose(want.values, found.values, rtol=1e-6, atol=1e-9)  # layouts in memory may differ
    assert np.array_equal(want.calls, found.calls)
    assert (recomputed.trace().calls <= 1).all()


class Recomputed(nn.Module):
    """Two layers, the second of which is recomputed twice."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(2, 3), nn.Linear(3, 3), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def leaf(size: int) -> Tensor:
    return torch.ones(size, 2, requires_grad=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # those of the inner checkpoint
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_their_gradients_in_the_step_of_their_forward(reentrant: bool) -> None:
    wrapped = noesis.wrap(Recomputed(reentrant), layers="leaves", gradients=True)
    outputs = [wrapped(leaf(size)) for size in (1, 2)] + [checkpoint(wrapped, leaf(3), use_reentrant=reentrant)]
    with wrapped.paused():
        outputs.append(wrapped(leaf(4)))
    for output in outputs:
        output.sum().backward()
    assert wrapped.gradients()["count"].tolist() == [[3, 3], [6, 6], [9, 9]]
    before = wrapped(leaf(5))
    wrapped.reset()
    wrapped(leaf(6))
    before.sum().backward()
    assert not wrapped.gradients()["count"].any()
    wrapped.every = 2
    for size in (7, 8, 9):
        wrapped(leaf(size)).sum().backward()
    assert wrapped.gradients()["count"].tolist() == [[0, 0], [24, 24]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_output_picker_that_fails_does_not_stop_the_recomputation(reentrant: bool) -> None:
    wrapped = noesis.wrap(Net(recompute=reentrant), layers="linear", output=lambda output: output[99], gradients=True)
    wrapped(next(batches(1))[0]).sum().backward()
    assert all(reason.startswith("IndexError: ") for reason in wrapped.gradients().unmeasured.values())
    assert wrapped.gradients().unmeasured


def test_a_sample_has_its_own_gradient() -> None:
    wrapped = noesis.wrap(Net(), layers="blocks", gradients=True, per_sample=True)
    train(wrapped, steps=2)
    found = wrapped.gradients()
    assert len(found.samples) == 4
    assert sum(sample["count"] for sample in found.samples).tolist() == found["count"].tolist()
    assert not np.array_equal(found.samples[0]["mean"], found.samples[1]["mean"])


def test_gradients_go_to_the_step_of_their_forward() -> None:
    layer = nn.Linear(2, 3)
    wrapped = noesis.wrap(nn.Sequential(layer), layers="0", gradients=True, capacity=4)
    outputs = [wrapped(torch.ones(size, 2)) for size in (1, 2, 3)]
    (outputs[1].sum() * 2).backward()
    (outputs[0].sum() * 1).backward(retain_graph=True)
    outputs[0].sum().backward()
    (outputs[2].sum() * 3).backward()
    found = wrapped.gradients()
    assert found["mean"][:, 0].tolist() == [1, 2, 3]
    assert found["count"][:, 0].tolist() == [6, 6, 9]
    assert found.calls[:, 0].tolist() == [2, 1, 1]
    assert found.averages[0].tolist() == [3, 6, 0]


def test_late_gradients_are_in_the_totals_and_too_late_ones_are_named() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="0", gradients=True, capacity=2)
    outputs = [wrapped(torch.ones(1, 2)) for _ in range(5)]
    for output in outputs[3:]:
        output.sum().backward()
    for _ in range(4):
        wrapped(torch.ones(1, 2)).sum().backward()
    found = wrapped.gradients()
    assert found.totals[0, 0] == 6 * 3
    assert not found.unmeasured
    outputs[0].sum().backward()
    assert "left the ring" in wrapped.gradients().unmeasured["0"]


def test_every_other_step() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="0", gradients=True, every=2)
    outputs = [wrapped(torch.ones(1, 2)) for _ in range(4)]
    for factor, output in enumerate(outputs):
        (output.sum() * factor).backward()
    found = wrapped.gradients()
    assert found.steps.tolist() == [0, 2]
    assert found["mean"][:, 0].tolist() == [0, 2]
    wrapped.every = 1
    wrapped(torch.ones(1, 2)).sum().backward()
    assert wrapped.gradients().steps.tolist() == [0, 2, 4]


def test_paused_and_reset() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="0", gradients=True)
    before = wrapped(torch.ones(1, 2))
    with wrapped.paused():
        wrapped(torch.ones(1, 2)).sum().backward()
    with wrapped.run(note="fresh"):
        before.sum().backward()  # of the run before
        assert not wrapped.gradients()["count"].any()
        wrapped(torch.ones(5, 2)).sum().backward()
    found = wrapped.gradients()
    assert found["count"].tolist() == [[15]]
    assert (found.meta["note"], found.meta["of"], found.meta["run"]) == (
        "fresh",
        "gradients",
        wrapped.trace().meta["run"],
    )


def test_layers_without_a_gradient_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Identity(), nn.Linear(2, 2))
    wrapped = noesis.wrap(model, layers="leaves", gradients=True)
    with torch.no_grad():
        wrapped(torch.ones(1, 2))
    wrapped(torch.ones(1, 2)).sum().backward()
    found = wrapped.gradients()
    assert found.never_ran == ["0", "1"]
    assert found["count"].tolist() == [[0, 0, 0], [0, 0, 2]]


class Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, unused: Tensor) -> Tensor:
        return x + unused

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_no_gradient_at_all_is_no_strange_gradient() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return Unused.apply(self.used(x), self.unused(x))

    wrapped = noesis.wrap(Two(), layers="leaves", gradients=True)
    wrapped(torch.ones(1, 2)).sum().backward()
    assert (wrapped.gradients().unmeasured, wrapped.gradients().never_ran) == ({}, ["unused"])


class Viewed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(*x.shape[:-1], self.out_features)


@pytest.mark.parametrize(("layer", "never"), [(nn.Linear, []), (Viewed, ["0"])])
def test_a_view_that_is_modified_in_place_has_no_gradient(layer: type[nn.Linear], never: list[str]) -> None:
    """What autograd does: changing a view in place replaces the node that a hook waits at."""
    wrapped = noesis.wrap(nn.Sequential(layer(2, 3), nn.ReLU(inplace=True)), layers="leaves", gradients=True)
    wrapped(torch.ones(5, 2)).sum().backward()
    assert wrapped.gradients().never_ran == never


def test_a_leaf_is_named_and_keeps_no_hooks() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), layers="leaves", gradients=True)
    x = torch.ones(1, 2, requires_grad=True)
    for _ in range(3):
        wrapped(x).sum().backward()
    assert "its gradient is its .grad" in wrapped.gradients().unmeasured["0"]
    assert not x._backward_hooks


def test_nonfinite_gradients_are_found_where_they_began() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    wrapped = noesis.wrap(model, layers="leaves", gradients=True)
    output = wrapped(torch.ones(1, 2))
    (output.sum() * float("inf")).backward()
    assert wrapped.trace().first_nonfinite() is None
    assert wrapped.gradients().first_nonfinite() == (0, "2")  # the first that a backward pass came to


def test_no_activation_is_kept_alive() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), layers="leaves", gradients=True)
    output = wrapped(torch.ones(1, 2))
    seen = weakref.ref(output)
    output.sum().backward()
    gc.disable()
    try:
        del output
        assert seen() is None
    finally:
        gc.enable()


def test_outputs_are_saved_without_a_warning(tmp_path) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="0", gradients=True)
    torch.save(wrapped(torch.ones(1, 2)), tmp_path / "output.pt")  # a warning is an error in these tests


def test_copies_have_gradients_of_their_own() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="0", gradients=True)
    wrapped(torch.ones(1, 2)).sum().backward()
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        other(torch.ones(4, 2)).sum().backward()
        assert other.gradients()["count"].tolist() == [[3], [12]]
    assert wrapped.gradients()["count"].tolist() == [[3]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)).to(dtype), layers="0", gradients=True)
    (wrapped(torch.ones(4, 2, dtype=dtype)) * 0.5).sum().backward()  # an expanded gradient
    assert wrapped.gradients().layer("0")[0, :3].tolist() == [12, 0.5, 0]


def test_gradients_of_gradients() -> None:
    bare = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    model = copy.deepcopy(bare)
    wrapped = noesis.wrap(model, layers="leaves", gradients=True)
    found = []
    for net in (bare, wrapped):
        x = torch.ones(4, 2, requires_grad=True)
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert same(*found)
    assert wrapped.gradients()["count"][0].tolist() == [24, 24, 4]  # the hidden ones are passed a second time


def test_compiled_code_gives_none_and_says_so() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), layers="leaves", gradients=True)
    compiled = torch.compile(wrapped.observed_model, backend="aot_eager", fullgraph=True)
    compiled(torch.ones(1, 2)).sum().backward()
    assert len(wrapped.trace()) == 1
    assert "compiled code gives none" in wrapped.gradients().unmeasured["0"]


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_layers_of_a_compiled_block_are_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

    model = nn.Sequential(Block(), nn.Linear(3, 1))
    wrapped = noesis.wrap(model, layers="all", gradients=True)
    model[0].compile(backend="eager", fullgraph=True)
    wrapped(torch.ones(1, 2)).sum().backward()
    found = wrapped.gradients()
    assert found["count"].tolist() == [[3, 0, 1]]
    assert list(found.unmeasured) == ["0.inner"]
    assert "compiled code gives none" in found.unmeasured["0.inner"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from Dynamo itself
def test_a_layer_of_which_only_some_calls_are_compiled_is_named(fresh_dynamo: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.apart(x))

        @torch.compiler.disable
        def apart(self, x: Tensor) -> Tensor:
            return self.inner(x)

    wrapped = noesis.wrap(nn.Sequential(Twice()), layers="0.inner", gradients=True)
    torch.compile(wrapped.observed_model, backend="eager")(torch.ones(1, 2)).sum().backward()
    assert wrapped.trace().calls.tolist() == [[2]]
    found = wrapped.gradients()
    assert found.calls.tolist() == [[1]]
    assert found.unmeasured == {"0.inner": "1 gradients of 2 calls: compiled code gives none"}


def test_outputs_that_cannot_be_measured_are_named() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="0", gradients=True)
    x = torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)], layout=torch.jagged)
    wrapped(x).values().sum().backward()
    assert wrapped.gradients().unmeasured == wrapped.trace().unmeasured != {}


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.slow
@pytest.mark.core
def test_compiled_autograd_runs_as_one_graph_and_gives_none() -> None:
    """It traces hooks, and what a traced hook did read the memory of tensors that were gone."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    wrapped = noesis.wrap(copy.deepcopy(bare), layers="leaves", gradients=True)
    for net in (bare, wrapped):
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            net(torch.ones(2, 2)).sum().backward()
    assert same([p.grad for p in bare.parameters()], [p.grad for p in wrapped.parameters()])
    assert wrapped.gradients().never_ran == ["0", "1", "2"]


def test_skipped_forwards_give_none_when_some_were_compiled() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), layers="leaves", gradients=True, every=2)
    torch.compile(wrapped.observed_model, backend="eager")(torch.ones(1, 2))
    for size in (1, 2, 3):
        wrapped(torch.ones(size, 2)).sum().backward()
    assert wrapped.gradients()["count"].tolist() == [[3], [9]]


def test_calibrating_leaves_no_mark(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    wrapped = noesis.wrap(model, layers="leaves", gradients=True, codebook=noesis.Codebook(size=2, dim=4))
    wrapped.calibrate([torch.randn(50, 4) for _ in range(6)], progress=False)
    wrapped(torch.randn(5, 4)).sum().backward()
    assert wrapped.gradients().steps.tolist() == wrapped.trace().steps.tolist() == [0]
    wrapped.log_to(tmp_path / "run.jsonl", layers="each")
    line = json.loads((tmp_path / "run.jsonl").read_text())
    assert line["noesis/gradients/2/mean"] == 1
    assert line["noesis/gradients/sum_of_layers/nonfinite"] == 0


def test_without_a_backward_pass_nothing_is_logged_of_gradients(tmp_path) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 3)), gradients=True)
    wrapped(torch.ones(1, 2))
    assert not [name for name in wrapped.log_to(tmp_path / "run.jsonl") if "gradients" in name]


def test_files_and_comparison(tmp_path) -> None:
    runs = []
    for scale in (1.0, 3.0):
        wrapped = noesis.wrap(Net().eval(), layers="blocks", gradients=True)
        (wrapped(torch.arange(6)[None]).sum() * scale).backward()
        path = wrapped.gradients().save(tmp_path / f"{scale}.safetensors")
        runs.append(noesis.Trace.load(path))
    changes = noesis.compare(*runs)
    assert changes.rows[0].std_b == pytest.approx(3 * changes.rows[0].std_a, rel=1e-5)


def test_errors() -> None:
    with pytest.raises(noesis.NoesisError, match="gradients=3"):
        noesis.wrap(nn.Sequential(nn.Linear(2, 2)), gradients=3)
    with pytest.raises(noesis.NoesisError, match="gradients=True"):
        noesis.wrap(nn.Sequential(nn.Linear(2, 2))).gradients()
