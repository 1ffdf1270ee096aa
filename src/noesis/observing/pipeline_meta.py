"""What is known of a call of a pipeline: its arguments, and which guidance branches a forward holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layers import denoisers_of

#: Pipelines that put the conditional half of a doubled batch first; all others put it last.
COND_FIRST = ("AceStep", "DiT", "Lumina", "StableCascade", "Wuerstchen", "ZImage")
#: Arguments that say how to hand out the result, not what to make.
LEFT_OUT = ("generator", "output_type", "return_dict")


def guidance_branch(pipe: Any, given: Mapping[str, Any], batch: int) -> str | None:
    """Which guidance branches a forward with this batch holds, within a call of the pipeline.

    Returns:
        Their names in the order of the parts of the batch, `"cond"`, `"uncond+cond"`, `"cond+perturbed"` (of
        perturbed-attention guidance), or None where that cannot be told, as with a guiding image.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None and isinstance(given.get("guidance_scale"), (int, float)):
        guided = given["guidance_scale"] > 1
    if guided is None or isinstance(guided, Tensor):  # a tensor would have to be waited for
        return None
    names = ["uncond", "cond"] if guided else ["cond"]
    if type(pipe).__name__.startswith(COND_FIRST):
        names.reverse()
    if getattr(pipe, "do_perturbed_attention_guidance", False) is True:
        names.append("perturbed")
    images = _images(given)
    if batch % len(names) or (images is not None and batch != len(names) * images):
        return None
    return "+".join(names)


def _images(given: Mapping[str, Any]) -> int | None:
    """How many images, videos or sounds a call makes; None where its arguments do not say."""
    prompt = given.get("prompt")
    embeds = given.get("prompt_embeds")
    if isinstance(prompt, str):
        prompts = 1
    elif isinstance(prompt, (list, tuple)):
        prompts = len(prompt)
    elif isinstance(embeds, (list, tuple, Tensor)):
        prompts = len(embeds)
    else:
        return None
    return prompts * images_per_prompt(given)


def images_per_prompt(given: Mapping[str, Any]) -> int:
    """How many images, videos or sounds a call makes of each prompt."""
    each = [value for name, value in given.items() if re.fullmatch(r"num_\w+_per_prompt", name)]
    return (each[0] or 1) if each else 1


def call_meta(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of one call of a pipeline, in values that JSON holds.

    Arguments appear under their own names, the pipeline's defaults included; tensors and images are
    described, not kept. `seed` is what the generators were seeded with, None without a generator.
    """
    denoisers = denoisers_of(pipe)
    parameter = next((p for module in denoisers.values() for p in module.parameters()), None)
    scheduler = getattr(pipe, "scheduler", None)
    known = {
        "model": str(getattr(getattr(pipe, "config", None), "_name_or_path", None) or type(pipe).__name__),
        "pipeline": type(pipe).__name__,
        "class": ", ".join(type(module).__name__ for module in denoisers.values()),
        "seed": _described(given.get("generator")),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "scheduler_config": _plain(getattr(scheduler, "config", {})),
        "device": str(getattr(pipe, "_execution_device", None) or (parameter.device if parameter is not None else "")),
        "dtype": "" if parameter is None else str(parameter.dtype).removeprefix("torch."),
    }
    caches = {type(getattr(module, "_cache_config", None)).__name__ for module in denoisers.values()} - {"NoneType"}
    if caches:  # rows of blocks that a cache leaves out are of what it returns in their place
        known["cache"] = ", ".join(sorted(name.removesuffix("Config") for name in caches))
    for package in ("diffusers", "transformers"):
        if package in sys.modules:
            known[f"{package}_version"] = sys.modules[package].__version__
    asked = {
        name: _described(value)
        for name, value in given.items()
        if value is not None and name not in LEFT_OUT and not name.startswith("callback")
    }
    return {**asked, **known}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The public settings of a diffusers config that are a string or a number."""
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and isinstance(value, (str, bool, int, float))
    }


def _described(value: Any) -> Any:
    """The value itself if JSON holds it, else what kind of thing it is."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(element) for element in value]
    if isinstance(value, Mapping):
        return {str(name): _described(element) for name, element in value.items()}
    if isinstance(value, torch.Generator):
        return value.initial_seed()
    if isinstance(value, (np.generic, Path)):
        return value.item() if isinstance(value, np.generic) else str(value)
    described: dict[str, Any] = {"type": type(value).__name__}
    if isinstance(value, (Tensor, np.ndarray)):
        described |= {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    elif hasattr(value, "mode") and isinstance(getattr(value, "size", None), tuple):  # an image of Pillow
        described |= {"size": list(value.size), "mode": value.mode}
    return described


def gathered(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """One meta for several calls: what they share, and where they differ a list of each one's value."""
    gathered: dict[str, Any] = {}
    for name in dict.fromkeys(name for meta in metas for name in meta):
        values = [meta.get(name) for meta in metas]
        gathered[name] = values[0] if all(value == values[0] for value in values) else values
    return gathered
