"""Small models of torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def small() -> nn.Sequential:
    """Three layers, each time with the same weights: 4 numbers in, 3 out."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Returns(nn.Module):
    """A layer that returns `value(x)`."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value(x)


class Block(nn.Module):
    """A residual block: a norm, two linear layers, a dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.up(self.norm(x)).relu()))


class TopKRouter(nn.Module):
    """A router as transformers writes them: logits, weights and indices of the experts that tokens are sent to."""

    def __init__(self, size: int = 8, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.weight = nn.Parameter(torch.randn(experts, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        weights, indices = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1)
        return logits, weights, indices


class Garments(nn.Module):
    """The trained classifier of the data folder."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width, stride in ((3, 16, 2), (16, 32, 1), (32, 48, 1)):
            layers += [nn.Conv2d(width_in, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if width > 16 else []
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(768, 32), nn.ReLU())
        self.classifier = nn.Linear(32, 20)
        self.load_state_dict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.hidden(self.features(x)))
