"""Denoisers of diffusers, those of the small pipelines and some more."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry, Inputs, numbers

STEPS = torch.tensor([10, 500])


def of_pipeline(name: str) -> nn.Module:
    """The denoiser of a small pipeline."""
    from helpers import pipelines

    pipe = pipelines.build(name)
    denoiser: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return denoiser


def denoiser(name: str, **config: Any) -> nn.Module:
    """A denoiser by its class."""
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**config)
    return model


def image(channels: int, size: int, words: tuple[int, int] | None = None, **more: Tensor) -> Inputs:
    """Noise [2, channels, size, size] at two timesteps, with an embedded text if `words` says of what shape."""
    text = {} if words is None else {"encoder_hidden_states": numbers(2, *words, seed=1)}
    return {"hidden_states": numbers(2, channels, size, size), "timestep": STEPS.clone(), **text, **more}


def unet(size: int, words: tuple[int, int] | None = None, channels: int = 4, **more: Any) -> Inputs:
    """The same under the names that U-Nets have."""
    text = {} if words is None else {"encoder_hidden_states": numbers(2, *words, seed=1)}
    return {"sample": numbers(2, channels, size, size), "timestep": STEPS.clone(), **text, **more}


def sdxl() -> Inputs:
    return unet(8, (5, 64), added_cond_kwargs={"text_embeds": numbers(2, 32), "time_ids": torch.ones(2, 6)})


def sd3() -> Inputs:
    return image(4, 8, (5, 64), pooled_projections=numbers(2, 64))


def flux() -> Inputs:
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1)
    return {
        "hidden_states": numbers(2, 16, 4),
        "encoder_hidden_states": numbers(2, 5, 32, seed=1),
        "pooled_projections": numbers(2, 32),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }


def wan() -> Inputs:
    video = numbers(2, 16, 2, 4, 4)
    return {
        "hidden_states": video,
        "timestep": STEPS.clone(),
        "encoder_hidden_states": numbers(2, 5, 32, seed=1),
    }


def cogvideo() -> Inputs:
    return {
        "hidden_states": numbers(2, 1, 4, 8, 8),
        "timestep": STEPS.clone(),
        "encoder_hidden_states": numbers(2, 5, 16, seed=1),
    }


RESNETS = {"down_blocks.N.resnets.N": 2, "up_blocks.N.resnets.N": 4, "mid_block.resnets.N": 2}


def unet_blocks(down: int, up: int, middle: int, kind: str = "attentions.N.transformer_blocks.N") -> dict[str, int]:
    """Blocks of a U-Net with a number of blocks of attention on its way down, up and in the middle."""
    return {**RESNETS, f"down_blocks.N.{kind}": down, f"up_blocks.N.{kind}": up, f"mid_block.{kind}": middle}


ZOO = [
    Entry(
        "UNet2DModel",
        "denoiser of images",
        partial(
            denoiser,
            "UNet2DModel",
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        partial(unet, 8, channels=3),
        unet_blocks(1, 2, 1, "attentions.N"),
    ),
    Entry(
        "SD 1.5", "denoiser of images", partial(of_pipeline, "sd15"), partial(unet, 8, (5, 32)), unet_blocks(1, 2, 1)
    ),
    Entry("SDXL", "denoiser of images", partial(of_pipeline, "sdxl"), sdxl, unet_blocks(2, 4, 2)),
    Entry("SD3", "denoiser of images", partial(of_pipeline, "sd3"), sd3, {"transformer_blocks.N": 2}),
    Entry(
        "Flux",
        "denoiser of images",
        partial(of_pipeline, "flux"),
        flux,
        {"transformer_blocks.N": 2, "single_transformer_blocks.N": 2},
    ),
    Entry(
        "PixArt",
        "denoiser of images",
        partial(of_pipeline, "pixart"),
        partial(image, 4, 8, (5, 32)),
        {"transformer_blocks.N": 2},
    ),
    Entry(
        "DiT",
        "denoiser of images",
        partial(
            denoiser,
            "DiTTransformer2DModel",
            sample_size=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_embeds_ada_norm=10,
        ),
        partial(image, 4, 8, class_labels=torch.tensor([1, 2])),
        {"transformer_blocks.N": 2},
    ),
    Entry("Wan", "denoiser of videos", partial(of_pipeline, "wan"), wan, {"blocks.N": 2}),
    Entry(
        "CogVideoX",
        "denoiser of videos",
        partial(
            denoiser,
            "CogVideoXTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=16,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=1,
            max_text_seq_length=5,
        ),
        cogvideo,
        {"transformer_blocks.N": 2},
    ),
]
