"""Small architectures, written out: what `models.py` measures and no library here brings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions around a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or width_in != 4 * width:
            shortcut = nn.Conv2d(width_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 as in torchvision: four stages of 3, 4, 6 and 3 bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        width_in = 64
        for stage, (depth, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
            strides = [1 if stage == 1 else 2] + [1] * (depth - 1)
            widths = [width_in] + [4 * width] * (depth - 1)
            blocks = [Bottleneck(before, width, stride) for before, stride in zip(widths, strides, strict=True)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width_in = 4 * width
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class FeedForward(nn.Module):
    """A transformer's feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Add(nn.Module):
    """A layer that costs little, so that the cost of looking at it shows."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Stack(nn.Module):
    """Layers that each see the same input, so that values do not drift."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Add() for _ in range(depth))
        self.register_buffer("place", torch.zeros(()))  # a model without tensors would be on no device

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer(x)
        return x
