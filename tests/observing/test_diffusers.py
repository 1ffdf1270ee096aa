"""Real diffusers pipelines of small size: what noesis sees of them, and that they do not notice."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import PIL.Image
import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.hooks import FirstBlockCacheConfig
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import noesis
from helpers.pipelines import PROMPT, build, call, vae, wrapping
from noesis.layers import DENOISER
from noesis.observing.pipeline_meta import guidance_branch

pytestmark = pytest.mark.usefixtures("one_thread")

FIVE = ["sdxl", "sd15", "sd3", "flux", "pixart"]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Each pipeline, built once; whoever wraps one unwraps it."""
    return {name: build(name) for name in [*FIVE, "wan"]}


def denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


@contextmanager
def seen_by(module: nn.Module) -> Iterator[list[tuple[float, int]]]:
    """(timestep, batch) of each forward, collected by a hook of torch's own."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    seen: list[tuple[float, int]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        timestep = torch.as_tensor(given["timestep"], dtype=torch.float64).flatten()
        assert timestep.unique().numel() == 1
        seen.append((timestep[0].item(), len(given[names[0]])))

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ---------------------------------------------------------------- observing changes nothing


@pytest.mark.parametrize("name", [*FIVE, "wan"])
@pytest.mark.parametrize("settings", [{}, {"layers": "all", "per_sample": True, "every": 2}], ids=["blocks", "all"])
def test_the_image_is_bitwise_the_same(pipelines: dict[str, Any], name: str, settings: dict[str, Any]) -> None:
    pipe = pipelines[name]
    plain = call(name, pipe)
    with wrapping(pipe, **settings) as wrapped:
        np.testing.assert_array_equal(call(name, pipe), plain)
        assert len(wrapped.trace()) > 0
    np.testing.assert_array_equal(call(name, pipe), plain)
    assert np.isfinite(plain).all()
    assert plain.std() > 0


@pytest.mark.parametrize("name", FIVE)
def test_no_random_numbers_are_used(pipelines: dict[str, Any], name: str) -> None:
    def state_after_a_call() -> torch.Tensor:
        torch.manual_seed(3)
        call(name, pipelines[name], steps=2, generator=None)
        return torch.get_rng_state()

    plain = state_after_a_call()
    with wrapping(pipelines[name]):
        assert torch.equal(state_after_a_call(), plain)


def test_the_pipeline_is_what_it_was(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sdxl"]
    original, unet, text_encoder = type(pipe), pipe.unet, pipe.text_encoder
    before = dict(pipe.components), repr(pipe), dict(pipe.config), inspect.signature(pipe.__call__)
    keys = list(unet.state_dict())
    with wrapping(pipe) as wrapped:
        assert (dict(pipe.components), repr(pipe), dict(pipe.config), inspect.signature(pipe.__call__)) == before
        assert pipe.unet is unet
        assert wrapped.observed_model is pipe
        assert isinstance(pipe, original)
        assert type(pipe) is not original
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(pipe), attribute) == getattr(original, attribute)
        assert list(unet.state_dict()) == keys
        assert not any(isinstance(m, noesis.Observed) for part in (text_encoder, pipe.vae) for m in part.modules())
        assert isinstance(unet, noesis.Observed)
    assert type(pipe) is original
    assert "_noesis" not in vars(pipe)
    assert not any(isinstance(module, noesis.Observed) for module in unet.modules())


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_saving_and_loading(pipelines: dict[str, Any], name: str, tmp_path: Path) -> None:
    pipe = pipelines[name]
    pipe.save_pretrained(tmp_path / "plain")
    with wrapping(pipe, layers="all"):
        pipe.save_pretrained(tmp_path / "wrapped")
        expected = call(name, pipe, steps=2)
        loaded = type(pipe).from_pretrained(tmp_path / "wrapped")  # also from the class made by noesis
    assert sorted(p.relative_to(tmp_path / "wrapped") for p in (tmp_path / "wrapped").rglob("*")) == sorted(
        p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*")
    )
    index = json.loads((tmp_path / "wrapped" / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "plain" / "model_index.json").read_text())
    for again in (loaded, diffusers.DiffusionPipeline.from_pretrained(tmp_path / "wrapped")):
        again.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(call(name, again, steps=2), expected)
    with wrapping(again) as wrapped:
        call(name, again, steps=1)
        assert wrapped.trace().meta["model"] == str(tmp_path / "wrapped")


def test_other_pipelines_from_the_same_parts(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sdxl"]
    with wrapping(pipe) as wrapped:
        other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        assert type(other) is diffusers.StableDiffusionXLImg2ImgPipeline
        assert other.unet is pipe.unet
        with wrapping(other) as again:
            assert again._recorder is wrapped._recorder
            image = PIL.Image.new("RGB", (32, 32), "teal")
            other(PROMPT, image=image, strength=0.5, num_inference_steps=4, output_type="latent")
            meta = again.trace().meta
            assert (meta["strength"], len(again.trace())) == (0.5, 2)
            assert meta["image"] == {"type": "Image", "size": [32, 32], "mode": "RGB"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies(pipelines: dict[str, Any], copied: Any) -> None:
    pipe = pipelines["sd15"]
    with wrapping(pipe) as wrapped:
        expected = call("sd15", pipe)
        rows = wrapped.trace().values
        with wrapping(copied(pipe)) as other:
            assert other.model is not pipe.unet
            twin = other._pipeline.pipe
            assert type(twin).__name__ == "StableDiffusionPipeline"
            np.testing.assert_array_equal(call("sd15", twin), expected)
            np.testing.assert_array_equal(other.trace().values, rows)
            call("sd15", twin, steps=1)
        assert type(twin) is diffusers.StableDiffusionPipeline
        assert len(wrapped.trace()) == 3


def test_copying_a_denoiser_copies_no_pipeline(pipelines: dict[str, Any]) -> None:
    with wrapping(pipelines["sd15"]) as wrapped:
        call("sd15", pipelines["sd15"], steps=1)
        unet = wrapped.unet
        assert len(pickle.dumps(unet)) < 1.5 * sum(p.nbytes for p in unet.parameters())


def test_a_pipeline_is_freed_without_the_garbage_collector() -> None:
    import gc
    import weakref

    pipe = build("sd15")
    call("sd15", pipe, steps=1)
    wrapped = noesis.wrap(pipe)
    call("sd15", pipe, steps=1)
    gone = weakref.ref(pipe)
    gc.disable()
    try:
        del pipe, wrapped
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_lora_is_loaded_as_before(pipelines: dict[str, Any], tmp_path: Path) -> None:
    images, keys = [], []
    torch.manual_seed(5)
    teacher = copy.deepcopy(pipelines["sdxl"])
    teacher.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    lora = peft.get_peft_model_state_dict(teacher.unet)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=lora)
    for observed in (False, True):
        pipe = copy.deepcopy(pipelines["sdxl"])
        plain = call("sdxl", pipe, steps=2)
        wrapped = noesis.wrap(pipe, layers=["blocks", "linear"]) if observed else None
        pipe.load_lora_weights(tmp_path)
        images.append(call("sdxl", pipe, steps=2))
        keys.append(list(pipe.unet.state_dict()))
        assert not np.array_equal(images[-1], plain)
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(call("sdxl", pipe, steps=2), plain)
        if wrapped is not None:
            wrapped.unwrap()
            assert type(pipe) is diffusers.StableDiffusionXLPipeline
    np.testing.assert_array_equal(*images)
    assert keys[0] == keys[1]


# ---------------------------------------------------------------- steps and timesteps


@pytest.mark.parametrize("name", FIVE)
def test_steps_are_the_denoisers_forwards(pipelines: dict[str, Any], name: str) -> None:
    pipe = pipelines[name]
    with wrapping(pipe) as wrapped, seen_by(denoiser(pipe)) as seen:
        call(name, pipe, steps=4)
    trace = wrapped.trace()
    assert len(seen) == len(trace) == 4
    np.testing.assert_array_equal(trace.timesteps, [timestep for timestep, _ in seen])
    np.testing.assert_array_equal(trace.batches, [batch for _, batch in seen])
    np.testing.assert_array_equal(trace.steps, range(4))
    assert (trace.timesteps.max() <= 1) == (name == "flux")  # Flux is told t / 1000
    assert trace.never_ran == []
    assert trace.unmeasured == {}


def test_a_second_order_scheduler_has_more_forwards_than_steps() -> None:
    pipe = build("sd15")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with wrapping(pipe) as wrapped, seen_by(pipe.unet) as seen:
        call("sd15", pipe, steps=3)
    trace = wrapped.trace()
    assert len(seen) == len(trace) == 5
    np.testing.assert_array_equal(trace.timesteps, [timestep for timestep, _ in seen])
    assert len(set(trace.timesteps)) == 3
    assert (trace.meta["num_inference_steps"], trace.meta["scheduler"]) == (3, "HeunDiscreteScheduler")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_dual_stream_blocks_measure_the_image(pipelines: dict[str, Any], name: str) -> None:
    pipe = pipelines[name]
    blocks = dict(pipe.transformer.named_modules())
    with wrapping(pipe) as wrapped:
        outputs: dict[str, list[tuple[Any, Any]]] = {layer: [] for layer in wrapped.observed_layers}
        handles = [
            blocks[layer].register_forward_hook(lambda m, i, output, layer=layer: outputs[layer].append(output))
            for layer in wrapped.observed_layers
        ]
        call(name, pipe)
        for handle in handles:
            handle.remove()
    trace = wrapped.trace()
    assert trace.layers[:2] == ["transformer_blocks.0", "transformer_blocks.1"]
    for layer, returned in outputs.items():
        image = torch.stack([output[1] for output in returned]).double().flatten(1)
        at = trace.layers.index(layer)
        np.testing.assert_array_equal(trace["count"][:, at], image.shape[1])
        np.testing.assert_allclose(trace["mean"][:, at], image.mean(1), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(trace["std"][:, at], image.std(1), rtol=1e-5)
        if returned[0][0] is not None:  # the last block of SD3 has no text left to return
            text = torch.stack([output[0] for output in returned]).double().flatten(1)
            assert not np.allclose(trace["std"][:, at], text.std(1), rtol=1e-3)


@pytest.mark.parametrize("name", FIVE)
def test_soulprints_of_a_step_and_of_the_run(pipelines: dict[str, Any], name: str) -> None:
    with wrapping(pipelines[name]) as wrapped:
        call(name, pipelines[name])
        trace, whole = wrapped.trace(), wrapped.soulprint()
        steps = [trace.soulprint(step=step).vector for step in range(3)]
        assert whole.vector.shape == (2 * len(wrapped.observed_layers),)
        np.testing.assert_allclose(whole.vector, np.mean(steps, axis=0), rtol=1e-6)
        assert not np.allclose(steps[0], steps[2], rtol=1e-4)
        call(name, pipelines[name])
        np.testing.assert_array_equal(wrapped.soulprint().vector, whole.vector)
        call(name, pipelines[name], seed=8)
        assert not np.array_equal(wrapped.soulprint().vector, whole.vector)
        assert (whole.meta["seed"], wrapped.soulprint().meta["seed"]) == (7, 8)


def test_wrapping_the_denoiser_alone(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd15"]
    with wrapping(pipe.unet) as wrapped, seen_by(pipe.unet) as seen:
        assert type(pipe) is diffusers.StableDiffusionPipeline
        call("sd15", pipe)
        call("sd15", pipe, steps=2)
        trace = wrapped.trace()
        np.testing.assert_array_equal(trace.timesteps, [timestep for timestep, _ in seen])
        assert trace.branches == [None] * 5
        assert "prompt" not in trace.meta
    with wrapping(pipelines["flux"].transformer) as wrapped:
        call("flux", pipelines["flux"], steps=1, true_cfg_scale=2.0, negative_prompt="fog")
        assert wrapped.trace().branches == ["cond", "uncond"]


# ---------------------------------------------------------------- guidance


def test_two_calls_per_step_name_their_branch(pipelines: dict[str, Any]) -> None:
    with wrapping(pipelines["flux"]) as wrapped:
        call("flux", pipelines["flux"], steps=2, true_cfg_scale=2.0, negative_prompt="fog")
        trace = wrapped.trace()
        assert trace.branches == ["cond", "uncond"] * 2
        assert trace.batches.tolist() == [1] * 4
        assert trace.timesteps.tolist() == [1.0, 1.0, 0.5, 0.5]
        assert not np.allclose(trace["mean"][0], trace["mean"][1])
        call("flux", pipelines["flux"], steps=2)
        assert wrapped.trace().branches == ["cond"] * 2


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3", "pixart"])
def test_a_doubled_batch_is_both_branches(pipelines: dict[str, Any], name: str) -> None:
    with wrapping(pipelines[name]) as wrapped:
        call(name, pipelines[name], steps=2, num_images_per_prompt=2)
        assert (wrapped.trace().branches, wrapped.trace().batches.tolist()) == (["uncond+cond"] * 2, [4, 4])
        call(name, pipelines[name], steps=2, guidance_scale=1.0, prompt=[PROMPT] * 2)
        assert (wrapped.trace().branches, wrapped.trace().batches.tolist()) == (["cond"] * 2, [2, 2])


def test_guidance_that_ends_within_the_run(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sdxl"]
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    tensors = ["latents", *cutoff.tensor_inputs]
    with wrapping(pipe) as wrapped:
        call("sdxl", pipe, steps=4, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=tensors)
    trace = wrapped.trace()
    assert trace.branches == ["uncond+cond", "uncond+cond", "cond", "cond"]
    assert trace.batches.tolist() == [2, 2, 1, 1]
    assert not any(name.startswith("callback") for name in trace.meta)


def test_three_branches_are_named(pipelines: dict[str, Any]) -> None:
    pipe = diffusers.StableDiffusionPAGPipeline(
        **{**pipelines["sd15"].components, "unet": copy.deepcopy(pipelines["sd15"].unet)}, pag_applied_layers="down.*"
    )
    pipe.set_progress_bar_config(disable=True)
    with wrapping(pipe) as wrapped:
        call("sd15", pipe, steps=1, pag_scale=3.0)
        assert (wrapped.trace().branches, wrapped.trace().batches.tolist()) == (["uncond+cond+perturbed"], [3])
        call("sd15", pipe, steps=1, pag_scale=3.0, num_images_per_prompt=2)
        assert (wrapped.trace().branches, wrapped.trace().batches.tolist()) == (["uncond+cond+perturbed"], [6])


def test_a_pipeline_that_puts_the_condition_first() -> None:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    labels = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    with wrapping(pipe) as wrapped:
        pipe([3], num_inference_steps=1, output_type="np")
        assert labels == [[3, 1000]]  # 1000 is the class of no class
        assert wrapped.trace().branches == ["cond+uncond"]
        assert wrapped.trace().meta["class_labels"] == [3]
    assert guidance_branch(pipe, {"guidance_scale": 4.0}, batch=3) is None  # no halves


def test_samples_are_the_halves_of_the_batch(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sdxl"]

    def first_rows(prompts: list[str]) -> np.ndarray[Any, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        call("sdxl", pipe, steps=1, prompt=prompts, generator=generators)
        assert wrapped.trace().meta["seed"] == [1, 2]
        return np.stack([sample["mean"][0] for sample in wrapped.trace().samples])

    with wrapping(pipe, per_sample=True) as wrapped:
        outputs: list[torch.Tensor] = []
        block = pipe.unet.get_submodule(wrapped.observed_layers[0])
        handle = block.register_forward_hook(lambda m, i, output: outputs.append(output.double()))
        rows = first_rows(["a moth", "a lamp"])
        handle.remove()
        assert rows.shape == (4, len(wrapped.observed_layers))
        np.testing.assert_allclose(rows[:, 0], outputs[0].flatten(1).mean(1), rtol=1e-4, atol=1e-8)
        assert len(wrapped.trace().samples[3].soulprint().vector) == 2 * len(wrapped.observed_layers)
        other = first_rows(["a moth", "a whale"])
        # At the first step nothing but the second image's conditional half knows of the new prompt.
        np.testing.assert_allclose(other[:3], rows[:3], rtol=1e-4, atol=1e-6)
        assert not np.allclose(other[3], rows[3], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- runs and meta


def test_meta_says_what_was_asked_for(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sdxl"]
    latents = torch.randn(1, 4, 16, 16)
    with wrapping(pipe) as wrapped:
        pipe(
            PROMPT,
            "in dusk",
            negative_prompt="fog",
            num_inference_steps=2,
            height=32,
            width=32,
            eta=0.5,
            latents=latents,
            generator=torch.Generator().manual_seed(11),
            cross_attention_kwargs={"scale": 0.5},
            output_type="latent",
        )
        meta = wrapped.trace().meta
    assert json.loads(json.dumps(meta)) == meta
    expected = {
        "prompt": PROMPT,
        "prompt_2": "in dusk",
        "negative_prompt": "fog",
        "num_inference_steps": 2,
        "guidance_scale": 5.0,  # the default of the pipeline
        "height": 32,
        "width": 32,
        "eta": 0.5,
        "seed": 11,
        "latents": {"type": "Tensor", "shape": [1, 4, 16, 16], "dtype": "float32"},
        "cross_attention_kwargs": {"scale": 0.5},
        "model": "StableDiffusionXLPipeline",
        "pipeline": "StableDiffusionXLPipeline",
        "class": "UNet2DConditionModel",
        "scheduler": "EulerDiscreteScheduler",
        "layers": "blocks",
        "device": "cpu",
        "dtype": "float32",
        "diffusers_version": diffusers.__version__,
        "transformers_version": sys.modules["transformers"].__version__,
        "torch_version": torch.__version__,
        "noesis_version": noesis.__version__,
        "pipeline_calls": 1,
    }
    assert {name: meta[name] for name in expected} == expected
    assert meta["scheduler_config"]["beta_schedule"] == "scaled_linear"
    assert meta["scheduler_config"]["timestep_spacing"] == "leading"
    assert not {"generator", "output_type", "return_dict", "callback_on_step_end", "image"} & set(meta)
    assert wrapped.soulprint().meta == meta


@pytest.mark.parametrize("name", FIVE)
def test_every_family_has_its_meta(pipelines: dict[str, Any], name: str) -> None:
    pipe = pipelines[name]
    with wrapping(pipe) as wrapped:
        call(name, pipe, steps=1, generator=None)
        meta = wrapped.trace().meta
    assert json.loads(json.dumps(meta)) == meta
    assert (meta["prompt"], meta["seed"], meta["num_inference_steps"]) == (PROMPT, None, 1)
    assert (meta["pipeline"], meta["class"]) == (type(pipe).__name__, type(denoiser(pipe)).__name__)
    assert meta["scheduler"] == type(pipe.scheduler).__name__
    assert meta["guidance_scale"] > 1


def test_meta_follows_the_model_to_another_precision() -> None:
    pipe = build("sd15")
    with wrapping(pipe) as wrapped:
        pipe.to(torch.bfloat16)
        image = call("sd15", pipe, steps=1)
        assert wrapped.trace().meta["dtype"] == "bfloat16"
    np.testing.assert_array_equal(call("sd15", pipe, steps=1), image)


def test_each_call_is_a_run(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd15"]
    with wrapping(pipe) as wrapped:
        call("sd15", pipe)
        first = wrapped.trace()
        call("sd15", pipe, steps=2)
        second = wrapped.trace()
    assert (len(first), len(second)) == (3, 2)
    assert first.meta["run"] != second.meta["run"]
    assert second.meta["pipeline_calls"] == 1


def test_a_named_run_gathers_calls(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd15"]
    with wrapping(pipe) as wrapped:
        with wrapped.run(note="study", model="ours"):
            call("sd15", pipe, seed=1)
            assert wrapped.trace().meta["seed"] == 1
            call("sd15", pipe, seed=2, steps=2, negative_prompt="fog")
        meta = wrapped.trace().meta
        assert len(wrapped.trace()) == 5
        assert (meta["note"], meta["model"], meta["pipeline_calls"]) == ("study", "ours", 2)
        assert (meta["prompt"], meta["seed"], meta["num_inference_steps"]) == (PROMPT, [1, 2], [3, 2])
        assert meta["negative_prompt"] == [None, "fog"]
        with wrapped.run(note="study", model="ours"):
            call("sd15", pipe, seed=3)
        assert (len(wrapped.trace()), wrapped.trace().meta["seed"]) == (3, 3)
        call("sd15", pipe, seed=4)
        assert "note" not in wrapped.trace().meta
        assert wrapped.trace().meta["model"] == "StableDiffusionPipeline"


def test_a_paused_call_leaves_the_run_alone(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd15"]
    with wrapping(pipe) as wrapped:
        call("sd15", pipe, seed=1)
        before = wrapped.trace()
        with wrapped.paused():
            call("sd15", pipe, seed=2)
        after = wrapped.trace()
    np.testing.assert_array_equal(after.values, before.values)
    assert after.meta == before.meta


def test_a_call_that_fails_is_the_pipelines_error(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd15"]
    with wrapping(pipelines["flux"]) as wrapped:
        call("flux", pipelines["flux"])
        with pytest.raises(TypeError, match=r"__call__\(\) got an unexpected keyword argument 'promt'"):
            pipelines["flux"](promt=PROMPT)
        assert len(wrapped.trace()) == 3
    with wrapping(pipe) as wrapped:
        call("sd15", pipe)
        with pytest.raises(ValueError, match="divisible by 8"):
            call("sd15", pipe, height=33)
        call("sd15", pipe, steps=2)
        assert len(wrapped.trace()) == 2
        pipe.unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 32))  # of its own, outside any call
        assert wrapped.trace().branches == ["uncond+cond"] * 2 + [None]


def test_wrapping_a_pipeline_again(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["sd15"]
    first = noesis.wrap(pipe)
    made = type(pipe)
    second = noesis.wrap(pipe)
    assert type(pipe) is made
    call("sd15", pipe)
    np.testing.assert_array_equal(first.trace().values, second.trace().values)
    first.unwrap()
    assert type(pipe) is diffusers.StableDiffusionPipeline
    third = noesis.wrap(pipe)
    second.unwrap()  # of a wrap that is over: it must not end the new one
    call("sd15", pipe, steps=2)
    assert (len(third.trace()), third.trace().meta["num_inference_steps"]) == (2, 2)
    third.unwrap()
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_a_class_built_on_ours_stays(pipelines: dict[str, Any]) -> None:
    pipe = copy.copy(pipelines["sd15"])
    wrapped = noesis.wrap(pipe)
    theirs = type("Theirs", (type(pipe),), {})
    pipe.__class__ = theirs
    wrapped.unwrap()
    assert type(pipe) is theirs
    call("sd15", pipe, steps=1)
    assert len(wrapped.trace()) == 0


# ---------------------------------------------------------------- which modules


def test_two_denoisers(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["wan"]
    parts = pipe.transformer, pipe.transformer_2
    with wrapping(pipe) as wrapped, seen_by(parts[0]) as noisy, seen_by(parts[1]) as clean:
        call("wan", pipe)
        assert (pipe.transformer, pipe.transformer_2) == parts
        trace = wrapped.trace()
    assert trace.layers == [f"transformer{part}.blocks.{block}" for part in ("", "_2") for block in (0, 1)]
    np.testing.assert_array_equal(trace.timesteps, [timestep for timestep, _ in noisy + clean])
    assert (len(noisy), len(clean)) == (2, 4)
    assert trace.branches == ["cond", "uncond"] * 3
    np.testing.assert_array_equal(trace.calls, [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 4)
    assert trace.meta["class"] == "WanTransformer3DModel, WanTransformer3DModel"
    assert not any(isinstance(module, noesis.Observed) for part in parts for module in part.modules())


class Decode(diffusers.DiffusionPipeline):
    """A real pipeline in which nothing denoises."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents).sample


def test_a_pipeline_without_a_denoiser(pipelines: dict[str, Any]) -> None:
    with pytest.raises(noesis.NoesisError) as error:
        noesis.wrap(Decode(pipelines["sd15"].vae))
    assert str(error.value) == (
        "Decode has no denoiser that noesis knows; its modules are vae. Expected a component named unet or "
        "transformer. Name the one to observe: noesis.wrap(pipe.vae)."
    )
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("names", "denoises"),
    [
        ("unet transformer dit transformer_2 unet_2 image_unet text_unet unconditional_transformer", True),
        ("prior prior_prior decoder diffusion_decoder super_res_first super_res_last model", True),
        ("vae vqgan movq text_encoder text_encoder_2 image_encoder language_model text_decoder", False),
        ("controlnet safety_checker vocoder prior_text_encoder condition_encoder latent_upsampler", False),
    ],
)
def test_components_that_denoise(names: str, denoises: bool) -> None:
    assert {name: bool(DENOISER.fullmatch(name)) for name in names.split()} == dict.fromkeys(names.split(), denoises)


def test_the_same_denoiser_under_two_names(pipelines: dict[str, Any]) -> None:
    pipe = copy.copy(pipelines["wan"])
    pipe.transformer_2 = pipe.transformer
    with wrapping(pipe) as wrapped:
        assert wrapped.transformer is pipe.transformer
        assert wrapped.observed_layers == ["blocks.0", "blocks.1"]


# ---------------------------------------------------------------- with diffusers' own machinery


def test_a_block_cache_switched_on_after_wrapping() -> None:
    images = []
    for observed in (False, True):
        pipe = build("flux")
        exact = call("flux", pipe, steps=4)
        wrapped = noesis.wrap(pipe, layers=["blocks", "linear"]) if observed else None
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        images.append(call("flux", pipe, steps=4))
        assert not np.array_equal(images[-1], exact)
        if wrapped is not None:
            trace = wrapped.trace()
            skipped = [layer.startswith("transformer_blocks.1.") for layer in trace.layers]
            assert (trace.calls[0, skipped] == 1).all()
            assert (trace.calls[1:, skipped] == 0).all()
            wrapped.unwrap()
        np.testing.assert_array_equal(call("flux", pipe, steps=4), images[-1])
        pipe.transformer.disable_cache()
        np.testing.assert_array_equal(call("flux", pipe, steps=4), exact)
    np.testing.assert_array_equal(*images)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["wrap then compile", "compile then wrap"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_denoiser(pipelines: dict[str, Any], order: str) -> None:
    pipe = copy.copy(pipelines["pixart"])
    with wrapping(pipe) as eager:
        call("pixart", pipe)
        expected = eager.trace()
    wrapped = noesis.wrap(pipe) if order == "wrap then compile" else None
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
    plain = None if wrapped is not None else call("pixart", pipe)
    wrapped = wrapped or noesis.wrap(pipe)
    image = call("pixart", pipe)
    trace = wrapped.trace()
    assert len(trace) == 3
    np.testing.assert_array_equal(trace.timesteps, expected.timesteps)
    assert trace.batches.tolist() == [2, 2, 2]
    assert trace.never_ran == []
    assert trace.branches == expected.branches == ["uncond+cond"] * 3
    assert trace.meta["seed"] == 7
    wrapped.unwrap()
    np.testing.assert_array_equal(call("pixart", pipe), image)
    if plain is not None:
        np.testing.assert_array_equal(image, plain)


@pytest.mark.parametrize("order", ["wrap then compile", "compile then wrap"])
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_part_alone(pipelines: dict[str, Any], order: str) -> None:
    part = copy.deepcopy(pipelines["sd15"].unet.time_embedding)
    x = torch.randn(2, 32)
    expected = part(x)
    wrapped = noesis.wrap(part, layers="linear") if order == "wrap then compile" else None
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    wrapped = wrapped or noesis.wrap(compiled, layers="linear")
    wrapped.reset()
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
    np.testing.assert_array_equal(wrapped.trace().calls, np.ones((3, 2)))
    wrapped.unwrap()
    assert torch.equal(compiled(x), expected)
    assert len(wrapped.trace()) == 3


@pytest.mark.slow
def test_repeated_blocks_compile_once():
    """diffusers' regional compilation finds blocks by class name; observed, they share their graph all the same."""

    def frames(observe: bool) -> tuple[int, list[list[int]]]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        pipe = build("flux")
        wrapped = noesis.wrap(pipe, layers="blocks") if observe else None
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        call("flux", pipe)
        return counter.frame_count, [] if wrapped is None else wrapped.trace().calls.tolist()

    bare, _ = frames(observe=False)
    observed, calls = frames(observe=True)
    assert observed == bare
    assert calls
    assert all(count == 1 for step in calls for count in step)
