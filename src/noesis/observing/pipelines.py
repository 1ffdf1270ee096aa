"""diffusers pipelines: which modules denoise, and a run of its own for every call of the pipeline.

The pipeline is observed as modules are: the object takes on a generated subclass of its own class,
whose `__call__` begins a fresh run, notes what the call was asked for, and says which guidance
branches each forward of the denoiser holds. Nothing of diffusers is imported or patched.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadValue
from ..internals.compiling import inside, rebind
from .recorder import Recorder

#: Components of diffusers pipelines that denoise. Text encoders, VAEs and controlnets are none.
DENOISER = re.compile(
    r"(\w+_)?(unet|transformer|dit)(_\d+)?"  # unet, transformer_2, image_unet, unconditional_transformer
    r"|(prior_)?prior|(diffusion_)?decoder|super_res_(first|last)|model"  # Kandinsky, Cascade, unCLIP, LLaDA
)
#: Pipelines that put the conditional half of a doubled batch first; all others put it last.
COND_FIRST = ("AceStep", "DiT", "Lumina", "StableCascade", "Wuerstchen", "ZImage")
#: Arguments that say how to hand out the result, not what to make.
LEFT_OUT = ("generator", "output_type", "return_dict")


class Pipeline:
    """A diffusers pipeline as `noesis.wrap` sees it.

    Args:
        pipe: the pipeline; it stays the same object, and so do its components.

    Example:
        >>> import diffusers, noesis, torch
        >>> unet = diffusers.UNet2DModel(
        ...     sample_size=8,
        ...     block_out_channels=(32,),
        ...     down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",),
        ... )
        >>> pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> wrapped = noesis.wrap(pipe)
        >>> _ = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(7))
        >>> trace = wrapped.trace()
        >>> trace.timesteps, trace.meta["seed"], trace.meta["scheduler"]
        (array([500.,   0.]), 7, 'DDPMScheduler')
        >>> wrapped.unwrap() is pipe.unet
        True
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.recorder: Recorder | None = None

    def denoisers(self) -> tuple[nn.Module, list[nn.Module]]:
        """The module that layers are selected in, and the modules whose forwards are steps.

        Returns:
            The denoiser and itself; with several, an `nn.ModuleDict` of them under their names in
            the pipeline, and all of them.

        Raises:
            NoesisError: when the pipeline has no denoiser known by name.
        """
        found = denoisers_of(self.pipe)
        if not found:
            modules = [name for name, value in self.pipe.components.items() if isinstance(value, nn.Module)]
            raise BadValue(
                f"{type(self.pipe).__name__} has no denoiser that noesis knows; "
                f"its modules are {', '.join(modules) or 'none'}",
                "a component named unet or transformer",
                f"Name the one to observe: noesis.wrap(pipe.{modules[0] if modules else '<component>'})",
            )
        roots = list(found.values())
        return (roots[0] if len(roots) == 1 else nn.ModuleDict(found)), roots

    def attach(self, recorder: Recorder) -> None:
        """Have every call of the pipeline begin a run of `recorder`."""
        self.recorder = recorder
        calls = getattr(self.pipe, "_noesis", None)
        if isinstance(calls, Calls) and calls.recorder is recorder:
            return
        if not isinstance(self.pipe, ObservedPipeline):
            object.__setattr__(self.pipe, "__class__", _observed_class(type(self.pipe)))
        self.pipe.__dict__["_noesis"] = Calls(recorder)
        recorder.evidence.unreached |= not self._rebind()

    def detach(self) -> None:
        """Give the pipeline its class back, unless another recorder has taken it over."""
        calls = getattr(self.pipe, "_noesis", None)
        if not isinstance(calls, Calls) or calls.recorder is not self.recorder:
            return
        original = _original_class(type(self.pipe))
        if type(self.pipe) is _observed_class(original):
            object.__setattr__(self.pipe, "__class__", original)
            del self.pipe.__dict__["_noesis"]
        else:  # another library has built a class on ours; it stays in between, and does nothing
            self.pipe.__dict__["_noesis"] = None
        self._rebind()

    def _rebind(self) -> bool:
        told = [rebind(component) for component in self.pipe.components.values()]
        return all(told)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by the names of their components, each once."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        module = inside(component)
        again = any(module is other for other in found.values())
        if DENOISER.fullmatch(name) and isinstance(module, nn.Module) and not again:
            found[name] = module
    return found


# ---------------------------------------------------------------- the observed pipeline


class ObservedPipeline:
    """Marks pipelines whose calls begin runs."""

    _noesis: Calls | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by way of the original class, since generated classes cannot be imported."""
        reduced = super().__reduce_ex__(protocol)
        newobj = copyreg.__newobj__  # type: ignore[attr-defined]
        if isinstance(reduced, tuple) and reduced[0] is newobj and reduced[1][0] is type(self):
            return (_new, (_original_class(type(self)), *reduced[1][1:]), *reduced[2:])
        return reduced


_MADE: dict[type, type] = {}


def _observed_class(original: type) -> type:
    """The subclass of a pipeline class whose calls begin runs, made once."""
    if original in _MADE:
        return _MADE[original]
    call: Callable[..., Any] = original.__call__

    @functools.wraps(call)  # callers read the signature
    def observed_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls: Calls | None = self._noesis
        if calls is None or calls.recorder.paused:
            return call(self, *args, **kwargs)
        try:
            given = _arguments(call, self, args, kwargs)
        except TypeError:  # the pipeline says best itself what is wrong
            return call(self, *args, **kwargs)
        with calls.one(self, given):
            return call(self, *args, **kwargs)

    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__call__": observed_call,
    }
    made: type = type(original)(original.__name__, (ObservedPipeline, original), body)
    _MADE[original] = made
    return made


def _original_class(observed: type) -> type:
    return observed.__mro__[observed.__mro__.index(ObservedPipeline) + 1]


def _new(original: type, *args: Any) -> Any:
    made = _observed_class(original)
    return made.__new__(made, *args)


class Calls:
    """The calls of an observed pipeline within the current run of its recorder."""

    # Without a reference to the pipeline: in a circle, `del pipe` would not free its memory at once.
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.given: dict[str, Any] | None = None
        self.metas: list[dict[str, Any]] = []

    @contextmanager
    def one(self, pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
        """A call of the pipeline: a run of its own, or one of those that a named run gathers."""
        recorder = self.recorder
        if not recorder.named_run:
            recorder.reset({})
        if self.given is not recorder.given:  # another run than at the last call
            self.given, self.metas = recorder.given, []
        self.metas.append(call_meta(pipe, given))
        found = {**_gathered(self.metas), "pipeline_calls": len(self.metas)}
        recorder.meta = {**recorder.meta, **found, **recorder.given}
        recorder.branch_of = functools.partial(guidance_branch, pipe, given)
        try:
            yield
        finally:
            recorder.branch_of = None


def _arguments(call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with, by name, defaults included."""
    signature = inspect.signature(call)
    bound = signature.bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= bound.arguments[name]
        else:
            named[name] = bound.arguments[name]
    return named


# ---------------------------------------------------------------- guidance


def guidance_branch(pipe: Any, given: Mapping[str, Any], batch: int) -> str | None:
    """Which guidance branches a forward with this batch holds, within a call of the pipeline.

    Returns:
        `"cond"`, `"uncond+cond"` or `"cond+uncond"` (the order of the halves of the batch), or None
        where that cannot be told, as with three branches or two calls per step.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None and isinstance(given.get("guidance_scale"), (int, float)):
        guided = given["guidance_scale"] > 1
    if guided is None or isinstance(guided, Tensor):  # a tensor would have to be waited for
        return None
    if not guided:
        return "cond"
    images = _images(given)
    if batch % 2 or (images is not None and batch != 2 * images):
        return None
    return "cond+uncond" if type(pipe).__name__.startswith(COND_FIRST) else "uncond+cond"


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
    each = [value for name, value in given.items() if re.fullmatch(r"num_\w+_per_prompt", name)]
    return prompts * (each[0] or 1) if each else prompts


# ---------------------------------------------------------------- meta


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


def _gathered(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """One meta for several calls: what they share, and where they differ a list of each one's value."""
    gathered: dict[str, Any] = {}
    for name in dict.fromkeys(name for meta in metas for name in meta):
        values = [meta.get(name) for meta in metas]
        gathered[name] = values[0] if all(value == values[0] for value in values) else values
    return gathered
