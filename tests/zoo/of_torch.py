"""torch's own modules, outputs of every kind, and the vision models that every library has, written small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .entry import Entry, Inputs, numbers, tokens

# ---------------------------------------------------------------- vision models, as timm and torchvision name them


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions."""

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16))
        self.global_pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.act(self.bn1(self.conv1(x)))))
        return self.fc(self.global_pool(x).flatten(1))


class DropPath(nn.Module):
    """Leaves a branch out, sample by sample."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), *[1] * (x.dim() - 1)), 0.8)) / 0.8


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.q_norm, self.k_norm = nn.Linear(width, 3 * width), nn.Identity(), nn.Identity()
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(rows, length, width)))


class ViTBlock(nn.Module):
    """Attention and feed-forward with a norm before each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(width), Attention(width), DropPath()
        self.norm2, self.drop_path2 = nn.LayerNorm(width), DropPath()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patches, a class token, two blocks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.Sequential(ViTBlock(width), ViTBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, and a feed-forward with the channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma, self.drop_path = nn.Parameter(torch.full((width,), 0.1)), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXtStage(nn.Module):
    """A downsampling and the blocks after it."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.GroupNorm(1, before), nn.Conv2d(before, width, 2, 2))
        self.blocks = nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stages = nn.Sequential(ConvNeXtStage(8, 8), ConvNeXtStage(8, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


# ---------------------------------------------------------------- torch's own modules


class Recurrent(nn.Module):
    """Words into a recurrent layer, which returns (outputs, state)."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.rnn = kind(8, 16, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> tuple[Tensor, Any]:
        outputs, state = self.rnn(self.words(ids))
        return self.head(outputs), state


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, which reads `out_proj` and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = self.attention(x, x, x)
        return self.head(x), weights


class Squash(nn.Module):
    """A parametrization: weights within (-1, 1)."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Conv1d(2, 3, 3))
    parametrize.register_parametrization(model[0], "weight", Squash())
    parametrizations.orthogonal(model[2])
    parametrizations.spectral_norm(model[3])
    return model


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))


def shared() -> nn.Module:
    """One block that stands in three places, and one activation in all of them."""
    act, block = nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    return nn.Sequential(block, act, block, act, nn.Sequential(nn.Linear(6, 6), act), block)


class Tied(nn.Module):
    """Words in and out by the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 8)
        self.bag, self.head = nn.EmbeddingBag(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.words(ids)) + self.bag(ids)[:, None])


class Kinds(nn.Module):
    """Layers of many kinds, from one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d, self.pool = nn.Conv3d(2, 4, 3, padding=1), nn.MaxPool3d((1, 2, 2))
        self.up, self.norm = nn.ConvTranspose2d(4, 4, 2, 2), nn.GroupNorm(2, 4)
        self.conv1d, self.instance = nn.Conv1d(4, 4, 3), nn.InstanceNorm1d(4, affine=True)
        self.prelu, self.drop, self.bilinear = nn.PReLU(4), nn.Dropout1d(0.3), nn.Bilinear(4, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.pool(self.conv3d(x)).mean(2)))
        x = self.drop(self.prelu(self.instance(self.conv1d(x.flatten(2)))))
        return self.bilinear(x.mean(2), x.amax(2))


# ---------------------------------------------------------------- outputs of every kind


@dataclasses.dataclass
class Output:
    """As libraries return them."""

    ids: Tensor
    hidden: Tensor
    extra: dict[str, Any]


class Part(nn.Module):
    """A block that returns what a function makes of its result."""

    def __init__(self, makes: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.makes = nn.Linear(6, 8), nn.Linear(8, 6), makes

    def forward(self, x: Tensor) -> Any:
        return self.makes(self.down(self.up(x)))


class Outputs(nn.Module):
    """Blocks that return something else than a tensor, beside a layer that returns one."""

    def __init__(self, makes: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(makes) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        return self.head(x), [part(x) for part in self.parts]


def as_none(_: Tensor) -> None:
    return None


def as_dict(x: Tensor) -> dict[str, Any]:
    return {"mask": x > 0, "inner": {"hidden": x, "text": "words"}}


def as_dataclass(x: Tensor) -> Output:
    return Output(x.argmax(-1), x, {"all": [x, x * 2]})


def as_tuples(x: Tensor) -> tuple[Any, ...]:
    return (None, (x.argmax(-1), [x, (x * 2,)])), x * 3


def as_nested(x: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor([x[0, :2], x[1]], layout=torch.jagged)


def as_sparse(x: Tensor) -> Tensor:
    return x.relu().to_sparse()


def as_complex(x: Tensor) -> Tensor:
    return torch.complex(x, x.tanh())


def as_integers(x: Tensor) -> Tensor:
    return x.argmax(-1)


def as_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(torch.bfloat16), x.double()


def as_numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss in front of the hidden state."""
    return x.square().mean(), x


class Lists(nn.Module):
    """Layers in a dict, chosen by a word, one of which never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"one": nn.Linear(6, 3), "two": nn.Linear(6, 3)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])

    def forward(self, x: Tensor, *, head: str) -> dict[str, Tensor]:
        return {head: self.heads[head](x) * self.scales[0]}


def rows(*shape: int) -> Inputs:
    return (numbers(*shape),)


def sentences() -> Inputs:
    return (tokens(),)


def pair() -> Inputs:
    return numbers(2, 5, 16), numbers(2, 4, 16, seed=1)


def transformer() -> nn.Module:
    return nn.Transformer(16, 2, 2, 2, dim_feedforward=24, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)


def chosen_head() -> Inputs:
    return {"x": numbers(4, 6), "head": "two"}


def empty() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


OWN, ODD, VISION = "torch.nn", "output", "vision, as in timm"
KINDS = {"conv3d": 1, "conv1d": 1, "up": 1, "norm": 1, "instance": 1, "prelu": 1, "bilinear": 1}
FOUR = partial(rows, 2, 4, 6)


def _odd(name: str, makes: Callable[[Tensor], Any], **more: Any) -> Entry:
    return Entry(name, ODD, partial(Outputs, makes), FOUR, {"parts.N": 2}, **more)


ZOO = [
    Entry("ResNet", VISION, ResNet, partial(rows, 2, 3, 8, 8), {"layer1.N": 2, "layer2.N": 2}, logits=nn.Identity()),
    Entry("ViT", VISION, ViT, partial(rows, 2, 3, 16, 16), {"blocks.N": 2}, logits=nn.Identity()),
    Entry("ConvNeXt", VISION, ConvNeXt, partial(rows, 2, 3, 16, 16), {"stages.N.blocks.N": 4}, logits=nn.Identity()),
    Entry("Transformer", OWN, transformer, pair, {"encoder.layers.N": 2, "decoder.layers.N": 2}),
    Entry("TransformerEncoder", OWN, encoder, partial(rows, 2, 5, 16), {"layers.N": 2}),
    Entry("MultiheadAttention", OWN, SelfAttention, partial(rows, 2, 5, 16), {"attention.out_proj": 1, "head": 1}),
    Entry("LSTM", OWN, partial(Recurrent, nn.LSTM), sentences, {"words": 1, "rnn": 1, "head": 1}),
    Entry("GRU", OWN, partial(Recurrent, nn.GRU), sentences, {"words": 1, "rnn": 1, "head": 1}),
    Entry("parametrized layers", OWN, parametrized, partial(rows, 4, 2, 6), {"N": 4}),
    Entry("weight_norm", OWN, weight_norm, partial(rows, 4, 6), {"N": 3}),
    Entry("shared modules", OWN, shared, partial(rows, 4, 6), {"N": 2}),
    Entry("Embedding, EmbeddingBag, tied", OWN, Tied, sentences, {"words": 1, "inner": 1, "bag": 1, "head": 1}),
    Entry("layers of many kinds", OWN, Kinds, partial(rows, 2, 2, 3, 4, 4), KINDS),
    Entry("ModuleDict, ParameterList", OWN, Lists, chosen_head, {"heads.one": 1, "heads.two": 1}),
    Entry("a batch of nothing", OWN, empty, partial(rows, 0, 6), {"N": 4}, coded=False),
    _odd("None", as_none, coded=False),
    _odd("dict", as_dict),
    _odd("dataclass", as_dataclass),
    _odd("nested tuples", as_tuples),
    _odd("a loss and a tensor", as_numbers),
    _odd("bfloat16 and float64", as_halves),
    _odd("nested tensor", as_nested, coded=False),
    _odd("sparse tensor", as_sparse, coded=False),
    _odd("complex tensor", as_complex, coded=False),
    _odd("integers", as_integers, coded=False),
]
