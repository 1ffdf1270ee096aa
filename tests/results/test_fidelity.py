"""compare of activations: relative errors, SQNR and cosines that are right, and honest about what was left out."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from noesis.errors import BadType, BadValue


def acts(*calls: Tensor, **layers: list[Tensor]) -> noesis.Activations:
    return noesis.Activations({"block": list(calls)} if calls else layers)


def test_the_numbers_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 8), (2, 1, 8), (2, 1, 8)]
    a = [torch.randn(shape, generator=generator) for shape in shapes]
    b = [x + 0.03 * torch.randn(x.shape, generator=generator) for x in a]
    found = noesis.compare(acts(*a), acts(*b))
    x, y = (torch.cat([call.reshape(-1, 8) for call in calls]).double() for calls in (a, b))
    assert found.relative_error[0] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
    assert found.sqnr[0] == pytest.approx(float(10 * torch.log10(x.square().sum() / (y - x).square().sum())), rel=1e-12)
    assert found.cosine[0] == pytest.approx(float(torch.cosine_similarity(x, y).mean()), rel=1e-12)
    errors = (y - x).norm(dim=1) / x.norm(dim=1)
    np.testing.assert_allclose(found.tokens("block"), errors.numpy(), rtol=1e-12)
    table = dict(zip(*(line.split(",") for line in found.to_csv().split()), strict=True))
    assert int(table["worst_token"]) == int(errors.argmax())
    assert float(table["worst_token_error"]) == pytest.approx(float(errors.max()), rel=1e-12)
    assert (found.nonfinite.tolist(), found.token_counts.tolist(), found.left_out) == ([0], [14], {})


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (7, 4), (6,), ()])
def test_of_other_outputs_each_sample_is_a_token(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = noesis.compare(acts(x), acts(1.01 * x))
    assert found.token_counts.tolist() == [shape[0] if shape else 1]
    assert found.relative_error[0] == pytest.approx(0.01, rel=1e-4)
    assert found.sqnr[0] == pytest.approx(40, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_activations_are_exactly_so(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64).to(dtype)
    found = noesis.compare(acts(x), acts(x.clone()))
    assert (found.relative_error[0], found.sqnr[0], found.cosine[0]) == (0, math.inf, 1)
    assert repr(found) == "Fidelity of 1 layer: equal"


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_no_size_overflows_or_vanishes(size: float) -> None:
    x = size * torch.randn(1, 3, 4, dtype=torch.float64)
    found = noesis.compare(acts(x), acts(1.1 * x))
    assert found.relative_error[0] == pytest.approx(0.1, rel=1e-9)
    assert found.cosine[0] == pytest.approx(1, rel=1e-12)


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [5.0, 12.0]]])
    y = torch.tensor([[[0.0, 1.0], [3.0, 4.0], [math.nan, math.inf], [math.inf, 12.0]]])
    found = noesis.compare(acts(x), acts(y))
    np.testing.assert_array_equal(found.tokens("block"), [math.inf, 0, math.nan, 0])
    assert found.nonfinite.tolist() == [3]
    assert found.relative_error[0] == pytest.approx(1 / 13)
    assert found.cosine[0] == pytest.approx(2 / 3)
    assert repr(found).endswith(", 3 elements not finite")
    assert str(found).splitlines()[2].split()[-3:] == ["nan", "2", "3"]
    nothing = noesis.compare(acts(torch.zeros(1, 1, 2)), acts(torch.ones(1, 1, 2)))
    assert (nothing.relative_error[0], nothing.sqnr[0], nothing.cosine[0]) == (math.inf, -math.inf, 0)
    lost = noesis.compare(acts(torch.full((1, 1, 2), math.nan)), acts(torch.ones(1, 1, 2)))
    assert math.isnan(lost.cosine[0])
    assert lost.nonfinite.tolist() == [2]


def test_layers_and_calls_that_only_one_run_has_are_named() -> None:
    x = torch.ones(1, 2, 3)
    a = acts(both=[x, x, x], longer=[x], other=[x], gone=[x], silent=[])
    b = acts(both=[x, x], longer=[torch.ones(1, 5, 3)], other=[x.flatten()], new=[x], silent=[])
    found = noesis.compare(a, b)
    assert found.layers == ["both"]
    assert found.token_counts.tolist() == [4]
    assert found.left_out == {
        "gone": "only in a",
        "new": "only in b",
        "both": "calls beyond the 2 that both have: a has 3, b 2",
        "longer": "call 0 has shape 1x2x3 in a and 1x5x3 in b",
        "other": "call 0 has shape 1x2x3 in a and 6 in b",
        "silent": "it did not run in both",
    }
    assert "left out: longer (call 0 has shape 1x2x3 in a and 1x5x3 in b)" in str(found)
    assert len(repr(found).splitlines()) == 1
    with pytest.raises(BadValue, match=r"no layer in common with the same shapes \(gone: only in a\).*token_deltas"):
        noesis.compare(acts(gone=[x]), acts(new=[x]))
    with pytest.raises(BadValue, match="there are no layers"):
        noesis.compare(noesis.Activations({}), noesis.Activations({}))
    with pytest.raises(BadValue, match="'gone' was not compared. Expected one of the 1 in .layers"):
        found.tokens("gone")


def test_activations_are_compared_with_activations_alone() -> None:
    x = acts(torch.ones(1, 1, 2))
    for pair in ((x, noesis.Soulprint([0.0], [1.0], ["block"])), ({}, x)):
        with pytest.raises(BadType, match=r"Activations and a (Soulprint|dict)\. Expected Activations of both runs"):
            noesis.compare(*pair)
    for option in ({"baseline": [x, x]}, {"tolerance": 0.1}):
        with pytest.raises(BadValue, match="activations with baseline or tolerance"):
            noesis.compare(x, x, **option)


def test_rounding_and_quantisation_are_told_in_decibels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])
    x = torch.randn(50, 64)

    def captured(changed: nn.Module, dtype: torch.dtype = torch.float32) -> noesis.Activations:
        with noesis.capture(changed) as kept, torch.no_grad():
            changed(x.to(dtype))
        return kept

    def eight_bits(weight: Tensor) -> Tensor:
        scale = weight.abs().max() / 127
        return (weight / scale).round() * scale

    exact = captured(model)
    quantised, broken = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in quantised.parameters():
            parameter.copy_(eight_bits(parameter))
        broken[2][0].weight.mul_(1.05)
    found = {
        "float32": noesis.compare(exact, captured(copy.deepcopy(model))),
        "float16": noesis.compare(exact, captured(copy.deepcopy(model).half(), torch.float16)),
        "int8": noesis.compare(exact, captured(quantised)),
        "bfloat16": noesis.compare(exact, captured(copy.deepcopy(model).bfloat16(), torch.bfloat16)),
        "broken": noesis.compare(exact, captured(broken)),
    }
    least = {name: float(each.sqnr.min()) for name, each in found.items()}
    assert least["float32"] == math.inf
    assert 55 < least["float16"] < 75
    assert 35 < least["bfloat16"] < 55
    assert 30 < least["int8"] < least["float16"]
    assert found["broken"].sqnr[:2].tolist() == [math.inf] * 2
    assert found["broken"].sqnr[2] < 35


def test_files_and_pictures(tmp_path: Any) -> None:
    x = {"a": [torch.randn(1, 3, 4)], "b,c": [torch.randn(1, 2, 4)]}
    y = {name: [call + 0.1 for call in calls] for name, calls in x.items()}
    a, b = noesis.Activations(x, meta={"run": "one"}), noesis.Activations({**y, "d": y["a"]})
    found = noesis.compare(a, b)
    for suffix in (".json", ".json.gz", ".safetensors"):
        again = noesis.Fidelity.load(found.save(tmp_path / f"found{suffix}"))
        assert str(again) == str(found)
        assert (again.meta, again.left_out) == ({"a": {"run": "one"}, "b": {}}, {"d": "only in b"})
        np.testing.assert_array_equal(again.tokens("b,c"), found.tokens("b,c"))
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b,c"]
