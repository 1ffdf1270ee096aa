"""Two versions of torch by saved captures: those of an older one lie beside this file, to compare with.

python tests/diffing/test_captures_of_versions.py     # by torch 2.11, writes them anew
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from noesis.cli import main

OLD = Path(__file__).parent / "captures"
WRITTEN_BY = "2.11.0"
INPUTS = 8


class Network(nn.Module):
    """Layers of several kinds, whose weights no version draws otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.GELU()
        self.head = nn.Linear(64, 16)
        self.scale = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.GRU(16, 8, batch_first=True)
        for number, parameter in enumerate(self.parameters()):
            waves = torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + number
            parameter.data.copy_(0.3 * waves.sin().reshape(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(self.head(self.act(self.norm(self.conv(x))).flatten(1)))[None]
        x, _ = self.attention(x, x, x)
        output: Tensor = self.recurrent(x)[0]
        return output


def capture_all(folder: Path, weight: float = 1.0) -> None:
    """A file per input."""
    model = Network().eval()
    model.head.weight.data *= weight
    for number in range(INPUTS):
        waves = torch.arange(2 * 16, dtype=torch.float64) * (0.3 + 0.1 * number)
        with noesis.capture(model, layers="leaves") as acts, torch.no_grad():
            model(waves.cos().float().reshape(2, 1, 4, 4))
        acts.save(folder / f"{number}.safetensors")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    capture_all(tmp_path / "new")
    return tmp_path / "new"


@pytest.mark.usefixtures("one_thread")
def test_an_older_torch_computes_the_same_but_for_rounding(new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(OLD), str(new), "--fail-over", "1e-5"]) == 0
    said = capsys.readouterr().out
    if torch.__version__.partition("+")[0] != WRITTEN_BY:
        assert f"different meta: torch_version '{WRITTEN_BY}" in said
        assert f"-> '{torch.__version__}'" in said
    assert "weight" not in said  # of which a capture says nothing
    one = main(["diff", str(OLD / "0.safetensors"), str(new / "0.safetensors"), "--fail-over", "1e-5"])
    assert one == 0


def test_what_changed_beside_the_version_is_found(tmp_path: Path) -> None:
    capture_all(tmp_path, weight=1.01)
    a, b = (
        [noesis.Activations.load(folder / f"{number}.safetensors") for number in range(INPUTS)]
        for folder in (OLD, tmp_path)
    )
    found = noesis.diff(a, b)
    assert found.first_divergence is not None
    assert found.first_divergence.layer == "head"
    assert found.layers == ["conv", "norm", "act", "head", "scale", "recurrent"]
    assert set(found.changed) <= {"head", "scale", "recurrent"}
    assert np.isfinite(found.errors).all()


if __name__ == "__main__":
    capture_all(OLD)
