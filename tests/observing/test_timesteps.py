"""The timestep of a step and of its samples, and the names of guidance branches, by what is in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noesis

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.pipelines import build, call, t5_encoder, t5_tokenizer  # noqa: E402  needs both


class Denoiser(nn.Module):
    """Takes a timestep, and has a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        return self.layer(x)


def told(timestep: Any, batch: int = 3, **wrap: Any) -> noesis.Trace:
    wrapped = noesis.wrap(Denoiser(), layers="linear", **wrap)
    wrapped(torch.ones(batch, 2), timestep)
    return wrapped.trace()


@pytest.mark.parametrize(
    ("timestep", "step", "samples"),
    [
        (7, 7, [7, 7, 7]),
        (torch.tensor(7), 7, [7, 7, 7]),
        (torch.tensor([7]), 7, [7, 7, 7]),
        (torch.tensor(7.0).expand(3), 7, [7, 7, 7]),
        (torch.tensor([7, 7, 7]), 7, [7, 7, 7]),
        (torch.tensor([10, 500, 900]), np.nan, [10, 500, 900]),
        (torch.tensor([10.0, 500, 900], dtype=torch.bfloat16).double(), np.nan, [10, 500, 900]),
        (torch.tensor([[0, 900, 900], [0, 900, 900], [0, 0, 900]]), 900, [900, 900, 900]),
        (torch.tensor([[0, 900], [0, 500], [0, 0]]), np.nan, [900, 500, 0]),
        (torch.tensor([0, 900, 0, 500, 0, 0]), np.nan, [900, 500, 0]),
        (torch.tensor([0, 800, 900, 100]), 900, [900, 900, 900]),  # of no samples that could be told apart
        (torch.tensor([2**40 + 1, 2**40 + 1, 3]), np.nan, [2**40 + 1, 2**40 + 1, 3]),
        (torch.tensor([1, 2, 3], dtype=torch.uint16), np.nan, [1, 2, 3]),
        (None, np.nan, [np.nan] * 3),
    ],
)
def test_the_timestep_of_a_step_and_of_its_samples(timestep: Any, step: float, samples: list[float]) -> None:
    trace = told(timestep, per_sample=True)
    np.testing.assert_array_equal(trace.timesteps, [step])
    np.testing.assert_array_equal([sample.timesteps[0] for sample in trace.samples], samples)
    np.testing.assert_array_equal(told(timestep).timesteps, [step])


def test_samples_keep_their_timesteps_over_steps_rings_and_larger_batches() -> None:
    wrapped = noesis.wrap(Denoiser(), layers="linear", per_sample=True, capacity=3)
    given = [[5.0, 6.0], [7.0, 7.0], list(range(20)), [1.0, 2.0]]
    for each in given:
        wrapped(torch.ones(len(each), 2), torch.tensor(each))
    trace = wrapped.trace()
    np.testing.assert_array_equal(trace.timesteps, [7, np.nan, np.nan])
    np.testing.assert_array_equal(trace.samples[1].timesteps, [7, 1, 2])
    np.testing.assert_array_equal(trace.samples[19].timesteps[1], 19)
    again = noesis.Trace.from_json(trace.to_json())
    np.testing.assert_array_equal(again.samples[1].timesteps, [7, 1, 2])
    wrapped.reset()
    wrapped(torch.ones(2, 2), 3)
    assert wrapped.trace().samples[1].timesteps.tolist() == [3]
    made = copy.deepcopy(wrapped)
    made(torch.ones(2, 2), torch.tensor([1, 2]))
    assert made.trace().samples[1].timesteps.tolist() == [3, 2]


def test_inference_mode_and_empty_batches_leave_no_trap() -> None:
    wrapped = noesis.wrap(Denoiser(), layers="linear", per_sample=True)
    with torch.inference_mode():
        wrapped(torch.ones(2, 2), torch.tensor([1, 2]))
        wrapped(torch.ones(20, 2), torch.arange(20))  # for which there was no room
    wrapped(torch.ones(2, 2), torch.tensor([3, 4])).sum().backward()
    assert wrapped.trace().samples[1].timesteps.tolist() == [2, 1, 4]
    wrapped(torch.ones(0, 2), torch.tensor([3, 4]))
    assert wrapped.trace().timesteps[-1] == 4


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_code_knows_the_steps(backend: str) -> None:
    wrapped = noesis.wrap(Denoiser(), layers="linear")
    compiled = torch.compile(wrapped.observed_model, backend=backend, fullgraph=True)
    for timestep in (
        torch.tensor([0, 900]),
        torch.tensor([700, 700]),
        torch.tensor([3]),
        torch.tensor([[0, 9], [0, 9]]),
    ):
        compiled(torch.ones(2, 2), timestep)
    np.testing.assert_array_equal(wrapped.trace().timesteps, [np.nan, 700, 3, 9])


def ltx(kind: Any) -> Any:
    """A small LTX pipeline, whose image-to-video kind has a timestep per token."""
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    wide = (8, 8, 8, 8)
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=wide, decoder_block_out_channels=wide,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    pipe = kind(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=t5_encoder().eval(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.mark.parametrize(("scale", "branch", "batch"), [(3.0, "uncond+cond", 2), (1.0, "cond", 1)])
def test_ltx_says_what_it_concatenates(scale: float, branch: str, batch: int) -> None:
    wrapped = noesis.wrap(ltx(diffusers.LTXPipeline))
    wrapped(prompt="a cat", negative_prompt="fog", guidance_scale=scale, output_type="latent", **SMALL)
    trace = wrapped.trace()
    assert (trace.branches, trace.batches.tolist()) == ([branch] * 2, [batch] * 2)
    assert trace.timesteps.tolist() == [1000.0, 500.0]


def wan(kind: Any) -> Any:
    """A small pipeline of the 5B kind of Wan 2.2 (TI2V), which expands its timesteps over tokens."""
    parts = {name: part for name, part in build("wan").components.items() if name != "transformer_2"}
    made = {name: None for name in ("image_processor", "image_encoder") if name in kind.__init__.__code__.co_varnames}
    pipe = kind(**{**parts, **made, "boundary_ratio": None}, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("make", "branches"),
    [
        (lambda: ltx(diffusers.LTXImageToVideoPipeline), ["uncond+cond"] * 2),
        (lambda: wan(diffusers.WanImageToVideoPipeline), ["cond", "uncond"] * 2),
        (lambda: wan(diffusers.WanPipeline), ["cond", "uncond"] * 2),
    ],
    ids=["LTX, image to video", "Wan TI2V, image to video", "Wan TI2V, text to video"],
)
def test_a_conditioned_frame_does_not_hide_the_timestep(make: Callable[[], Any], branches: list[str]) -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (32, 32))
    pipe = make()
    given: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["timestep"]), with_kwargs=True
    )
    wrapped = noesis.wrap(pipe, per_sample=True)
    start = {"image": image} if "ImageToVideo" in type(pipe).__name__ else {}
    prompt: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "fog"}
    if type(pipe).__name__.startswith("Wan"):  # whose pipelines clean a text by a package that is not needed here
        prompt = {"prompt_embeds": torch.ones(1, 16, 32), "negative_prompt_embeds": torch.zeros(1, 16, 32)}
    wrapped(guidance_scale=3.0, output_type="latent", **prompt, **start, **SMALL)
    trace = wrapped.trace()
    assert all(timestep.numel() > timestep.shape[0] for timestep in given)  # one per token
    assert all((timestep.amin() == 0) == bool(start) for timestep in given)
    assert trace.branches == branches
    steps = pipe.scheduler.timesteps.tolist()
    assert (len(steps), min(steps) > 0) == (2, True)
    assert trace.timesteps.tolist() == [step for step in steps for _ in range(len(branches) // 2)]
    assert all(sample.timesteps.tolist() == trace.timesteps.tolist() for sample in trace.samples)


def test_perturbed_attention_guidance_names_its_branches() -> None:
    plain = build("sd15")
    pipe = diffusers.StableDiffusionPAGPipeline(**plain.components, pag_applied_layers="down.*")
    pipe.set_progress_bar_config(disable=True)
    wrapped = noesis.wrap(pipe)
    for arguments, branch in (
        ({"guidance_scale": 5.0, "pag_scale": 3.0}, "uncond+cond+perturbed"),
        ({"guidance_scale": 1.0, "pag_scale": 3.0}, "cond+perturbed"),
        ({"guidance_scale": 5.0, "pag_scale": 0.0}, "uncond+cond"),
        ({"guidance_scale": 1.0, "pag_scale": 0.0}, "cond"),
    ):
        call("sd15", pipe, steps=1, **arguments)
        trace = wrapped.trace()
        assert (trace.branches, trace.batches.tolist()) == ([branch], [branch.count("+") + 1])


def test_a_cache_is_in_the_meta() -> None:
    pipe = build("flux")
    wrapped = noesis.wrap(pipe, layers=["blocks", "linear"])
    pipe.transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig(threshold=10.0))
    call("flux", pipe, steps=2)
    trace = wrapped.trace()
    assert trace.meta["cache"] == "FirstBlockCache"
    left_out = [name == "transformer_blocks.1" for name in trace.layers]
    inside = [name.startswith("transformer_blocks.1.") for name in trace.layers]
    assert (trace.calls[:, left_out] == 1).all()
    assert (trace.calls[1, inside] == 0).all()
    assert (trace.calls[0, inside] == 1).all()
    pipe.transformer.disable_cache()
    call("flux", pipe, steps=1)
    assert "cache" not in wrapped.trace().meta
