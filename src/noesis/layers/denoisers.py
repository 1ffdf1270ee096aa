"""Which components of a diffusers pipeline denoise."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..internals import inside

#: Components of diffusers pipelines that denoise. Text encoders, VAEs and controlnets are none.
DENOISER = re.compile(
    r"(\w+_)?(unet|transformer|dit)(_\d+)?"  # unet, transformer_2, image_unet, unconditional_transformer
    r"|(prior_)?prior|(diffusion_)?decoder|super_res_(first|last)|model"  # Kandinsky, Cascade, unCLIP, LLaDA
)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by the names of their components, each once."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        module = inside(component)
        again = any(module is other for other in found.values())
        if DENOISER.fullmatch(name) and isinstance(module, nn.Module) and not again:
            found[name] = module
    return found
