"""Small diffusers pipelines with random weights, built in code: every part real, nothing downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers

import noesis

PROMPT = "a glass moth in mauve twilight"


@contextmanager
def wrapping(model: Any, **settings: Any) -> Iterator[noesis.Wrapped]:
    """A model that others use too, wrapped inside."""
    wrapped = noesis.wrap(model, **settings)
    try:
        yield wrapped
    finally:
        wrapped.unwrap()


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token."""
    # The printable bytes stand for themselves, the others for characters from 256 on (as in GPT-2).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(folder)


def clip_encoder(kind: type = transformers.CLIPTextModel) -> Any:
    """A text encoder of width 32 for `clip_tokenizer`."""
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=514,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=32,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A T5 tokenizer whose pieces are single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in "abcdefghijklmnopqrstuvwxyz0123456789.,'"]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=100, model_max_length=77)


def t5_encoder(width: int = 32) -> transformers.T5EncoderModel:
    """A text encoder for `t5_tokenizer`."""
    config = transformers.T5Config(vocab_size=160, d_model=width, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4, **settings: Any) -> diffusers.AutoencoderKL:
    """An image VAE that halves each side."""
    return diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        sample_size=32,
        **settings,
    )


def flow_vae(channels: int) -> diffusers.AutoencoderKL:
    """The same as SD3 and Flux have it."""
    return vae(channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """A U-Net with two text encoders and classifier-free guidance as a doubled batch."""
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=64,  # 32 of each text encoder
            projection_class_embeddings_input_dim=80,  # 6 sizes and crops of 8, 32 of the pooled text
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def sd15() -> diffusers.StableDiffusionPipeline:
    """A U-Net with one text encoder."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """A transformer of dual-stream blocks, which return (text, image)."""
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=96,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flow_vae(4),
        text_encoder=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(64),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> diffusers.FluxPipeline:
    """Dual- and single-stream blocks; guidance as two calls per step."""
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flow_vae(1),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart() -> diffusers.PixArtSigmaPipeline:
    """A transformer whose pipeline does not tell whether it guides."""
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            use_additional_conditions=False,
        ),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


def wan() -> diffusers.WanPipeline:
    """Two transformers: one for the noisy half of the steps, one for the other half."""

    def transformer() -> diffusers.WanTransformer3DModel:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer(),
        transformer_2=transformer(),
        boundary_ratio=0.7,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sdxl": sdxl,
    "sd15": sd15,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "wan": wan,
}
#: What keeps a call of each small.
SIZES: dict[str, dict[str, Any]] = {
    "sdxl": {"height": 32, "width": 32, "guidance_scale": 5.0},
    "sd15": {"height": 32, "width": 32, "guidance_scale": 5.0},
    "sd3": {"height": 32, "width": 32, "guidance_scale": 5.0, "max_sequence_length": 48},
    "flux": {"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 48},
    "pixart": {
        "height": 32,
        "width": 32,
        "guidance_scale": 4.5,
        "max_sequence_length": 48,
        "clean_caption": False,
        "use_resolution_binning": False,
    },
    "wan": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 48},
}


def build(name: str, seed: int = 0) -> Any:
    """A pipeline as `from_pretrained` gives it: in eval mode, and quiet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe


def call(name: str, pipe: Any, steps: int = 3, seed: int = 7, **arguments: Any) -> Any:
    """The images (or frames) of one call, as an array."""
    given = {"prompt": PROMPT, "output_type": "np", **SIZES[name], **arguments}
    given.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(num_inference_steps=steps, **given)[0]
