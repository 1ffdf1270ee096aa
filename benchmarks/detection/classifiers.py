"""The classifiers of the detection sets: the given ResNet-20, and small ones that are trained here and kept."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Basic(nn.Module):
    """ResNet's block of two convolutions; its shortcut takes every other pixel and adds empty channels (option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            side = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, self.added - side))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al. 2015, section 4.2); `flatten` gives its 64 penultimate features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        width_in = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            first = Basic(width_in, width, 1 if stage == 1 else 2)
            self.add_module(f"layer{stage}", nn.Sequential(first, Basic(width, width, 1), Basic(width, width, 1)))
            width_in = width
        self.avgpool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(self.flatten(self.avgpool(x)))


class ConvBlock(nn.Sequential):
    """A convolution, BatchNorm and ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        convolution = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU())


class SmallConv(nn.Module):
    """Three stages of two blocks for 28 x 28 pictures; `flatten` gives its 64 penultimate features."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (1, 16, 16, 32, 32, 64, 64), (2, 1, 2, 1, 2, 1)
        pairs = zip(widths[:-1], widths[1:], strides, strict=True)
        self.blocks = nn.Sequential(*(ConvBlock(*sizes) for sizes in pairs))
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.blocks(x))))


def perceptron() -> nn.Sequential:
    """The digits' classifier, 64-128-64-8; its module `3` gives the 64 penultimate features."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))


class Attending(nn.Module):
    """A transformer's block: attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (N, tokens, width)
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer for 28 x 28 pictures: 49 patches and a class token; `norm` gives its 64 features."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Attending(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class CharGRU(nn.Module):
    """Two layers of a GRU over characters; `last` gives the 128 features of the last one."""

    def __init__(self, characters: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.gru = nn.GRU(32, 128, num_layers=2, batch_first=True)
        self.last, self.fc = nn.Identity(), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.gru(self.embedding(x))
        return self.fc(self.last(state[-1]))


def resnet20(path: Path) -> ResNet20:
    """ResNet-20 with the weights of the file."""
    model = ResNet20()
    weights = {key: value for key, value in load_file(path).items() if not key.endswith("num_batches_tracked")}
    found = model.load_state_dict(weights, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise SystemExit(f"{path}: not the weights of ResNet-20: without {missing}, with {found.unexpected_keys}")
    return model.eval()


def trained(
    model: nn.Module, path: Path, inputs: Tensor, labels: Tensor, *, epochs: int, seed: int, rate: float = 5e-3
) -> nn.Module:
    """The model with the weights of the file, or trained (Adam, one cycle of the learning rate) and then kept there."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
    batch, steps = 64, epochs * -(-len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(batch):
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()
