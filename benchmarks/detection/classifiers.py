"""The classifiers of the detection sets: the given ResNet-20, and two small ones that are trained here and kept."""

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


def resnet20(path: Path) -> ResNet20:
    """ResNet-20 with the weights of the file."""
    model = ResNet20()
    weights = {key: value for key, value in load_file(path).items() if not key.endswith("num_batches_tracked")}
    found = model.load_state_dict(weights, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise SystemExit(f"{path}: not the weights of ResNet-20: without {missing}, with {found.unexpected_keys}")
    return model.eval()


def trained(model: nn.Module, path: Path, inputs: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """The model with the weights of the file, or trained (Adam, one cycle of the learning rate) and then kept there."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
    batch, steps = 64, epochs * -(-len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
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
