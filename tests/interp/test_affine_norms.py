"""A norm is measured as the affine map it is at a point, by whatever name it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.families import family
from noesis.interp.norms import AffineNorm, measure_norm

#: Family -> its final norm, and whether it takes off the mean, by the family's paper.
FINAL = {
    "llama": ("model.norm", False),
    "gpt2": ("transformer.ln_f", True),
    "gemma2": ("model.norm", False),  # 1 + weight
    "olmo2": ("model.norm", False),
    "cohere": ("model.norm", True),  # no bias
    "neox": ("gpt_neox.final_layer_norm", True),
    "t5": ("decoder.final_layer_norm", False),
}


class Plus(nn.Module):
    """LayerNorm with 1 + weight, and an epsilon of 0, by which f(0) is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight) + self.bias


def some(width: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors with a mean, of sizes far apart, in which there are zeros."""
    x = torch.randn(5, 3, width) * torch.logspace(-2, 2, 5)[:, None, None] + 0.5
    x[..., 4] = 0
    return x.to(dtype)


def norms() -> dict[str, tuple[nn.Module, bool]]:
    found: dict[str, tuple[nn.Module, bool]] = {
        name: (family(name).get_submodule(path), centred) for name, (path, centred) in FINAL.items()
    }
    found["without weights"] = (nn.LayerNorm(32, elementwise_affine=False), True)
    found["RMSNorm"] = (nn.RMSNorm(32), False)
    dead = nn.LayerNorm(32)
    dead.weight.data[::3] = 0
    found |= {"plus": (Plus(), True), "dead channels": (dead, True)}
    return found


@pytest.mark.parametrize("name", norms())
def test_what_a_norm_does_to_parts_adds_up(name: str) -> None:
    norm, centred = norms()[name]
    x = some()
    affine = measured(norm, x)
    assert affine.centred == centred
    parts = torch.randn(4, *x.shape)
    parts[-1] = x - parts[:-1].sum(0)
    total = sum(affine.linear(part.double()) for part in parts) + affine.bias
    exact = norm.double()(x.double())
    assert (total - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", norms())
def test_directions_go_back_through_a_norm(name: str) -> None:
    affine = measured(norms()[name][0], some())
    part, direction = torch.randn(5, 3, 32).double(), torch.randn(5, 3, 32).double()
    forth, back = (affine.linear(part) * direction).sum(-1), (part * affine.back(direction)).sum(-1)
    assert torch.allclose(forth, back, rtol=1e-9, atol=1e-9)


def test_an_odd_width() -> None:
    norm = nn.LayerNorm(33)
    norm.weight.data.normal_()
    affine = measured(norm, some(33))
    assert affine.centred
    assert torch.allclose(
        affine.scale[0, 0] / affine.scale[0, 0, 0], (norm.weight / norm.weight[0]).double(), rtol=1e-5
    )


def test_half_precision_is_measured_within_its_rounding() -> None:
    affine = measured(family("llama").get_submodule("model.norm").bfloat16(), some(dtype=torch.bfloat16))
    assert 1e-5 < affine.check.error < affine.check.bound


def test_no_gradient_and_no_hook_is_left() -> None:
    norm, calls = nn.LayerNorm(32), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    affine = measured(norm, some().requires_grad_())
    assert not calls
    assert not affine.scale.requires_grad


class Partly(nn.Module):
    """Takes off half the mean."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x - x.mean(-1, keepdim=True) / 2, (32,))


class Squashed(nn.Module):
    """Dynamic tanh (Zhu et al. 2025): it stands where norms do, and each element has a factor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * x)


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (Squashed(), "Squashed is no norm: norm = scale"),
        (Partly(), "fails by"),
        (nn.GroupNorm(2, 32), "GroupNorm is no norm"),
        (nn.Sequential(nn.LayerNorm(32), nn.ReLU()), "fails by"),
        (nn.LayerNorm(16), "cannot be called with vectors alone"),
        (nn.Bilinear(32, 32, 32), "cannot be called with vectors alone"),
        (nn.Linear(32, 31), "the same shape"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_such_map_is_refused(norm: nn.Module, why: str) -> None:
    x = some()[:, 0]
    refused: Any = measure_norm(norm, x)
    assert isinstance(refused, str)
    assert why in refused


def test_not_a_number_is_no_measurement() -> None:
    x = some()
    x[0, 0, 0] = torch.nan
    assert "fails by nan" in str(measure_norm(nn.LayerNorm(32), x))


def measured(norm: nn.Module, x: Tensor) -> AffineNorm:
    found = measure_norm(norm, x)
    assert isinstance(found, AffineNorm), found
    return found
