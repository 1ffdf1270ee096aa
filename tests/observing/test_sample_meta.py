"""The samples of a batch know their number, their prompt and seed, and their guidance branch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback

import noesis
from helpers.pipelines import build, call
from noesis.observing.sample_meta import sample_meta

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a moth", "a lamp"]


@pytest.fixture(scope="module")
def sdxl() -> Iterator[Any]:
    pipe = build("sdxl")
    wrapped = noesis.wrap(pipe, per_sample=True)
    yield pipe, wrapped
    wrapped.unwrap()


def told(wrapped: noesis.Wrapped, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(sample.soulprint().meta.get(name) for name in names) for sample in wrapped.trace().samples]


def test_images_of_several_prompts_in_both_branches(sdxl: Any, tmp_path: Path) -> None:
    pipe, wrapped = sdxl
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    given = {"prompt": PROMPTS, "negative_prompt": ["fog", "rain"], "generator": generators}
    call("sdxl", pipe, steps=2, num_images_per_prompt=2, **given)
    names = ("sample", "branch", "prompt", "negative_prompt", "seed")
    want = [
        (sample, branch, PROMPTS[image // 2], ["fog", "rain"][image // 2], 5 + image)
        for sample, (branch, image) in enumerate([(branch, n) for branch in ("uncond", "cond") for n in range(4)])
    ]
    assert told(wrapped, *names) == want
    trace = wrapped.trace()
    assert trace.meta["prompt"] == PROMPTS
    assert "branch=cond" in repr(trace.samples[6].soulprint())
    for suffix in (".safetensors", ".json"):
        again = noesis.Trace.load(trace.save(tmp_path / f"trace{suffix}"))
        assert [sample.meta for sample in again.samples] == [sample.meta for sample in trace.samples]
    payload = json.loads(trace.to_json())
    for wrong in ([{}], 3, [3] * 8, "12345678"):
        with pytest.raises(noesis.NoesisError):
            noesis.Trace.from_json(json.dumps({**payload, "sample_meta": wrong}))
    del payload["sample_meta"]  # as in older files
    assert noesis.Trace.from_json(json.dumps(payload)).samples[3].meta["prompt"] == PROMPTS
    two = noesis.compare(trace.samples[0], trace.samples[4]).meta_differences
    assert two == {"sample": (0, 4), "branch": ("uncond", "cond")}


def test_without_guidance_and_with_guidance_that_ends(sdxl: Any) -> None:
    pipe, wrapped = sdxl
    call("sdxl", pipe, steps=1, prompt=PROMPTS, guidance_scale=1.0)
    assert told(wrapped, "sample", "branch", "prompt") == [(0, "cond", "a moth"), (1, "cond", "a lamp")]
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    tensors = ["latents", *cutoff.tensor_inputs]
    ends = {"callback_on_step_end": cutoff, "callback_on_step_end_tensor_inputs": tensors}
    call("sdxl", pipe, steps=4, prompt=PROMPTS[:1], **ends)
    # The first is the unconditional one until that is gone, and the conditional one takes its place.
    assert told(wrapped, "sample", "branch", "prompt") == [(0, None, "a moth"), (1, "cond", "a moth")]


def test_calls_of_a_named_run(sdxl: Any) -> None:
    pipe, wrapped = sdxl
    with wrapped.run(note="study"):
        call("sdxl", pipe, steps=1, seed=1, prompt="a moth", guidance_scale=1.0)
        call("sdxl", pipe, steps=1, seed=2, prompt="a lamp", guidance_scale=1.0)
    assert told(wrapped, "sample", "prompt", "seed", "note") == [(0, PROMPTS, [1, 2], "study")]
    with wrapped.run(prompt="ours"):
        call("sdxl", pipe, steps=1, prompt=PROMPTS)
    assert told(wrapped, "prompt") == [("ours",)] * 4


def test_two_calls_per_step_are_one_sample() -> None:
    pipe = build("flux")
    wrapped = noesis.wrap(pipe, per_sample=True)
    call("flux", pipe, steps=2, prompt=PROMPTS, negative_prompt="fog", true_cfg_scale=2.0)
    names = ("sample", "branch", "prompt", "negative_prompt")
    assert told(wrapped, *names) == [(0, None, "a moth", "fog"), (1, None, "a lamp", "fog")]


def test_batches_of_any_model() -> None:
    wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), per_sample=True)
    texts = ["one", "two", "three"]
    with wrapped.run(prompt=texts):
        wrapped(torch.randn(3, 4))
    assert told(wrapped, "sample", "prompt") == list(enumerate(texts))
    assert "branch" not in wrapped.trace().samples[0].meta
    with wrapped.run(prompt=texts):
        wrapped(torch.randn(2, 4))  # whose prompt is whose is not known
    assert told(wrapped, "sample", "prompt") == [(0, None), (1, None)]


def test_parts_are_named_in_their_order() -> None:
    meta, steps = {"prompt": PROMPTS, "seed": 3}, np.array([6])
    found = [sample_meta(at, [meta], ["uncond+cond+perturbed"], steps) for at in range(6)]
    assert [each["branch"] for each in found] == ["uncond"] * 2 + ["cond"] * 2 + ["perturbed"] * 2
    assert [each["prompt"] for each in found] == PROMPTS * 3
    assert "seed" not in found[0]
    first = [sample_meta(at, [meta], ["cond+uncond"], np.array([4]))["branch"] for at in range(4)]
    assert first == ["cond", "cond", "uncond", "uncond"]
