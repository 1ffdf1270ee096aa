"""What people put around a model: modes of torch, and ways to train; one test per row of docs/limitations.md."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import noesis
from compared import Seen, classes_of, compare, equal, gradients, net, some, train
from helpers.models import small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    def use(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return train(model)

    trace = compare(net, use)
    assert len(trace) == 1
    assert trace.never_ran == []


def test_inference_mode_and_training_after_it() -> None:
    def use(model: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            first = model.eval()(some())
        return [first, *train(model)]

    trace = compare(net, use, layers="all")
    assert trace.calls[:, trace.layers.index("stem")].tolist() == [1, 1]


def test_grad_scaler() -> None:
    """Three steps in float16, of which the second overflows: the scaler leaves it out."""

    def use(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
        found = []
        for step in range(3):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(some(seed=step) * (1e8 if step == 1 else 1)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            found += [loss.detach(), torch.tensor(scaler.get_scale()), *gradients(model)]
        return [*(torch.nan_to_num(tensor, nan=-1) for tensor in found), *(p.detach() for p in model.parameters())]

    bare, model = net(), net()
    expected = use(bare)
    wrapped = noesis.wrap(model, layers="leaves")
    assert equal(use(model), expected)
    trace = wrapped.trace()
    assert trace["count"][:, 0].tolist() == [40, 0, 40]
    assert trace["nonfinite"][:, 0].tolist() == [0, 40, 0]
    assert any(tensor.numel() == 1 and tensor == 2.0**9 for tensor in expected)  # halved by the overflow
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


def test_gradient_accumulation() -> None:
    def use(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        optimiser = torch.optim.AdamW(model.train().parameters(), lr=0.1)
        found = []
        for update in range(2):
            optimiser.zero_grad()
            for part in range(3):
                loss = model(some(2, seed=3 * update + part)).square().mean() / 3
                loss.backward()
                found.append(loss.detach())
            found += gradients(model)
            optimiser.step()
        return [*found, *(parameter.detach().clone() for parameter in model.parameters())]

    trace = compare(net, use, again=False)
    assert len(trace) == 6  # each forward is a step, and has its two samples
    assert trace.batches.tolist() == [2] * 6
    assert (trace.calls == 1).all()


def test_torch_func() -> None:
    """Weights from outside are measured; inside a transform nothing is, and the results are the bare model's."""
    bare, model = net().eval(), net().eval()
    wrapped = noesis.wrap(model, layers="leaves")
    weights = {name: 2 * value.detach() for name, value in bare.named_parameters()}

    def loss(of: nn.Module) -> Callable[..., Tensor]:
        return lambda weights, x: torch.func.functional_call(of, weights, (x,)).square().sum()

    assert torch.equal(loss(model)(weights, some()), loss(bare)(weights, some()))
    seen = Seen(bare)
    loss(bare)(weights, some())
    seen.check(wrapped.trace())
    assert wrapped.trace().unmeasured == {}
    wrapped.reset()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)), torch.func.jacrev):
        found, expected = transform(loss(model))(weights, some()), transform(loss(bare))(weights, some())
        assert equal(list(found.values()), list(expected.values()))
    trace = wrapped.trace()
    assert trace.totals[:, 0].sum() == 0
    assert list(trace.unmeasured) == trace.layers
    assert all("torch.func" in reason for reason in trace.unmeasured.values())
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


class Summing(nn.Module):
    """Has a sum of its own, of which there is one in measuring too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.a(x))
        h = h / h.abs().sum()
        return x + self.b(torch.tanh(h))


class Selective(nn.Module):
    """Checkpoints its blocks and saves the results of some operations, told by their names."""

    saved = (torch.ops.aten.sum.default, torch.ops.aten.addmm.default)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Summing(), Summing()])

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, list(self.saved))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def test_selective_checkpointing_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    bare = Selective()
    observed = copy.deepcopy(bare)
    wrapped = noesis.wrap(observed, layers="leaves")
    x = torch.randn(4, 8)
    for model in (bare, wrapped):
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(bare.parameters(), observed.parameters(), strict=True))
    assert (wrapped.trace().calls == 1).all()


def test_dispatch_modes_do_not_see_the_measuring() -> None:
    class Counts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    model = small()
    x = torch.randn(2, 4)
    with Counts() as bare:
        model(x)
    wrapped = noesis.wrap(model, layers="all")
    with Counts() as observed:
        model(x)
    assert observed.seen == bare.seen
    assert len(wrapped.trace()) == 1


def test_fake_tensor_mode() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(2, 4))
        assert len(noesis.wrap(small(), layers="all").trace()) == 0
        assert list(wrapped.trace().unmeasured) == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated since 2.13
def test_scripting_a_wrapped_model() -> None:
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    x = torch.ones(2, 4)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), wrapped(x))
