"""A bare model and an observed one that are used in the same way: equal to the bit, and the rows they should have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.models import Block

Model = Callable[[], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def some(rows: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """The output, the gradients, and the next random number."""
    torch.manual_seed(1)
    model.train().zero_grad()
    y = model(some() if x is None else x)
    y.float().square().sum().backward()
    return [y.detach(), *gradients(model), torch.rand(1)]


def infer(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    with torch.no_grad():
        return [model.eval()(some() if x is None else x)]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit."""
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def tensor_of(output: Any) -> Tensor | None:
    """The first floating tensor of an output."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for element in output if (found := tensor_of(element)) is not None), None)
    return None


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class Seen:
    """What the layers of a bare model return, by ordinary hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: self.add(name, output))

    def add(self, name: str, output: Any) -> None:
        found = tensor_of(output)
        if found is not None:
            self.outputs.setdefault(name, []).append(found.detach().double().flatten().clone())

    def check(self, trace: noesis.Trace) -> None:
        """The totals of a trace are those of these outputs; what has none is named."""
        for index, name in enumerate(trace.layers):
            outputs = self.outputs.get(name)
            if outputs is None:
                assert name in trace.never_ran or name in trace.unmeasured, name
                continue
            values = torch.cat(outputs)
            count, mean, std = trace.totals[index, :3]
            assert count == len(values), name
            assert mean == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6), name
            assert std == pytest.approx(values.std().item(), rel=1e-4, abs=1e-6), name


def compare(
    build: Model,
    use: Callable[[nn.Module], list[Tensor]],
    prepare: Callable[[nn.Module], Any] = lambda model: model,
    *,
    layers: Any = "leaves",
    wrap_first: bool = False,
    same_classes: bool = True,
    again: bool = True,
) -> noesis.Trace:
    """Use a bare model and an observed one in the same way: the same results, and the rows they should have.

    Args:
        build: makes a model, each time the same.
        use: runs it, and gives back what has to be equal.
        prepare: does something to it, before wrapping or after, and may give back another model.
        layers: what to observe.
        wrap_first: whether `prepare` comes after wrapping.
        same_classes: whether `unwrap` gives all classes back.
        again: whether `use` leaves the model as it was, so that it can be tried once more after `unwrap`.

    Returns:
        The trace.
    """
    bare = build()
    bare = prepare(bare) or bare
    expected = use(bare)
    listened = build()
    listened = prepare(listened) or listened
    seen = Seen(listened)
    use(listened)

    model = build()
    if not wrap_first:
        model = prepare(model) or model
    classes = classes_of(model)
    wrapped = noesis.wrap(model, layers=layers)
    if wrap_first:
        model = prepare(model) or model
    assert equal(use(model), expected)
    trace = wrapped.trace()
    seen.check(trace)
    assert trace.unmeasured == {}
    wrapped.unwrap()
    if same_classes:
        assert classes_of(model) == classes
    assert not again or equal(use(model), expected)
    return trace
