"""`layers=`: every kind of selector, and what "blocks" finds in each architecture."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import noesis
from noesis.layers import select
from noesis.layers.selecting import PRESETS


def names(model: nn.Module, layers) -> list[str]:
    return [name for name, _ in select(model, layers)]


def kinds(model: nn.Module, layers="blocks") -> dict[str, int]:
    """Names with their numbers left out, and how many there are."""
    found: dict[str, int] = {}
    for name in names(model, layers):
        pattern = re.sub(r"\d+", "N", name)
        found[pattern] = found.get(pattern, 0) + 1
    return found


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(4, 4), nn.Linear(4, 4)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)


class DecoderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(4), Attention(), MLP()


class Decoder(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(DecoderBlock() for _ in range(depth))
        self.head = nn.Linear(4, 10)


# ---------------------------------------------------------------- the sugar


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks", ["layers.0", "layers.1"]),
        ("layers.1", ["layers.1"]),
        ("layers.1.mlp.up", ["layers.1.mlp.up"]),
        ("layers.*", ["layers.0", "layers.1"]),
        ("layers.*.mlp", ["layers.0.mlp", "layers.1.mlp"]),
        ("*.mlp", ["layers.0.mlp", "layers.1.mlp"]),
        ("*_proj", [f"layers.{i}.attn.{p}_proj" for i in (0, 1) for p in "qo"]),
        ("layers.**.up", ["layers.0.mlp.up", "layers.1.mlp.up"]),
        ("layers.[1-9].mlp.?p", ["layers.1.mlp.up"]),
        ("re:^layers\\.0\\.(attn|mlp)$", ["layers.0.attn", "layers.0.mlp"]),
        (MLP, ["layers.0.mlp", "layers.1.mlp"]),
        (lambda name, module: name.endswith("act"), ["layers.0.mlp.act", "layers.1.mlp.act"]),
        (["head", "layers.*.norm", nn.Embedding], ["embed", "layers.0.norm", "layers.1.norm", "head"]),
        ("attention", ["layers.0.attn", "layers.1.attn"]),
        ("mlp", ["layers.0.mlp", "layers.1.mlp"]),
        ("norm", ["layers.0.norm", "layers.1.norm"]),
        ("first_linear", ["layers.0.attn.q_proj"]),
    ],
)
def test_selectors(layers, expected):
    assert names(Decoder(), layers) == expected


def test_presets_of_layers():
    model = Decoder()
    assert names(model, "all_linear") == names(model, "linear") == names(model, nn.Linear)
    assert "layers" not in names(model, "all")  # a ModuleList has no forward
    assert len(names(model, "all")) == sum(1 for _ in model.modules()) - 2
    assert names(model, "leaves") == [n for n, m in model.named_modules() if n and not list(m.children())]
    assert names(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), "conv") == ["0"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layers.0.mpl", r"selects nothing in Decoder.*Did you mean: 'layers.0.mlp'"),
        ("layers.*.mpl", "selects nothing"),
        ("re:^x", "Its layers have names like: 'embed'"),
        (nn.Conv3d, "layers=Conv3d selects nothing"),
        (lambda name, module: False, "layers=<lambda> selects nothing"),
        (["blocks", "nope"], "layers='nope' selects nothing"),
        ("conv", "layers='conv' selects nothing"),
        ("unet", "layers='unet' selects nothing"),
    ],
)
def test_no_match_raises_and_suggests(layers, message):
    with pytest.raises(noesis.NoesisError, match=message) as caught:
        select(Decoder(), layers)
    assert isinstance(caught.value, ValueError)
    assert "Expected a preset (blocks, all, leaves" in str(caught.value)


def test_every_preset_is_in_the_documentation():
    from noesis.layers import selecting

    assert all(f'"{name}"' in selecting.__doc__ for name in PRESETS)
    assert all(f'"{name}"' in noesis.wrap.__doc__ for name in PRESETS)


def test_a_parametrized_layer_is_one_layer():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.ReLU())
    assert names(model, "leaves") == ["0", "1"]


def test_peft_layers_are_one_layer():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert names(tuned, "linear") == ["base_model.model.0", "base_model.model.2"]
    wrapped = noesis.wrap(tuned, layers="linear")
    wrapped(torch.ones(1, 4))
    assert wrapped.trace().calls.tolist() == [[1, 1]]


# ---------------------------------------------------------------- blocks


class ResNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential()


class ResNet(nn.Module):
    """As torchvision's and the ResNet-20 of the data folder: layerN.M."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for index in (1, 2, 3):
            setattr(self, f"layer{index}", nn.Sequential(*[ResNetBlock() for _ in range(3)]))
        self.linear = nn.Linear(4, 10)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)
        self.fc = nn.Linear(4, 2)


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(4, 2)


def conv_unit() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Decoder(3), {"layers.N": 3}),
        (Decoder(1), {"layers.N": 1}),
        (ResNet(), {"layerN.N": 9}),
        (nn.Sequential(*[DecoderBlock() for _ in range(3)]), {"N": 3}),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), {"N": 3}),
        (nn.Sequential(conv_unit(), conv_unit(), nn.Flatten(), nn.Linear(4, 2)), {"N": 2}),
        (nn.Sequential(nn.Sequential(DecoderBlock(), DecoderBlock()), nn.Sequential(DecoderBlock())), {"N.N": 3}),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3), {"layers.N": 3}),
        (LeNet(), {"convN": 2, "fc": 1}),
        (Vgg(), {"features.N": 3, "classifier": 1}),
    ],
)
def test_blocks(model, expected):
    assert kinds(model) == expected


TRANSFORMERS = {
    "llama": {"model.layers.N": 3},
    "mistral": {"model.layers.N": 3},
    "gpt2": {"transformer.h.N": 3},
    "mixtral": {"model.layers.N": 3},
    "bert": {"encoder.layer.N": 3},
    "vit": {"layers.N": 3},
    "t5": {"encoder.block.N": 2, "decoder.block.N": 2},
    "resnet": {"encoder.stages.N.layers.N": 4},
    "convnext": {"encoder.stages.N.layers.N": 4},
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_blocks_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    image = {"image_size": 16, "patch_size": 8}
    build = {
        "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**common)),
        "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**common)),
        "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2)),
        "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**common, num_local_experts=4)),
        "bert": lambda t: t.BertModel(t.BertConfig(**common)),
        "vit": lambda t: t.ViTModel(t.ViTConfig(**{**common, **image})),
        "t5": lambda t: t.T5Model(t.T5Config(vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)),
        "resnet": lambda t: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2])),
        "convnext": lambda t: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2)),
    }
    assert kinds(build[family](transformers)) == TRANSFORMERS[family]


UNET = {
    "down_blocks.N.resnets.N": 4,
    "down_blocks.N.attentions.N.transformer_blocks.N": 4,
    "up_blocks.N.attentions.N.transformer_blocks.N": 6,
    "up_blocks.N.resnets.N": 6,
    "mid_block.attentions.N.transformer_blocks.N": 2,
    "mid_block.resnets.N": 2,
}


def test_blocks_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=8, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    assert kinds(unet) == UNET
    assert len(names(unet, "unet")) == 379  # as in the v0.1 files, written on a U-Net of this shape
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    assert kinds(flux) == {"transformer_blocks.N": 2, "single_transformer_blocks.N": 3}
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    assert kinds(sd3) == {"transformer_blocks.N": 2}
    pixart = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        cross_attention_dim=16,
    )  # fmt: skip
    assert kinds(pixart) == {"transformer_blocks.N": 2}
