"""diffusers pipelines: which modules denoise, and a run of its own for every call of the pipeline.

The pipeline is observed as modules are: the object takes on a generated subclass of its own class,
whose `__call__` begins a fresh run, notes what the call was asked for, and says which guidance
branches each forward of the denoiser holds. Nothing of diffusers is imported or patched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import BadValue
from ..internals import rebind
from ..layers import denoisers_of
from .pipeline_meta import call_meta, gathered, guidance_branch
from .recorder import Recorder
from .subclassing import Generated, by_original, make_subclass, original_class, subclass_of


class Pipeline:
    """A diffusers pipeline as `noesis.wrap` sees it.

    Args:
        pipe: the pipeline; it stays the same object, and so do its components.

    Examples:
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
        >>> wrapped.unwrap() is pipe
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
        original = original_class(type(self.pipe))
        if type(self.pipe) is subclass_of(original):
            object.__setattr__(self.pipe, "__class__", original)
            del self.pipe.__dict__["_noesis"]
        else:  # another library has built a class on ours; it stays in between, and does nothing
            self.pipe.__dict__["_noesis"] = None
        self._rebind()

    @classmethod
    def of(cls, pipe: Any) -> Pipeline:
        """A pipeline that may be observed already, by whichever recorder."""
        made, calls = cls(pipe), getattr(pipe, "_noesis", None)
        made.recorder = calls.recorder if isinstance(calls, Calls) else None
        return made

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The pipeline with the class that it had, for the length of a block."""
        recorder = self.recorder
        self.detach()
        try:
            yield
        finally:
            if recorder is not None:
                self.attach(recorder)

    def _rebind(self) -> bool:
        told = [rebind(component) for component in self.pipe.components.values()]
        return all(told)


# ---------------------------------------------------------------- the observed pipeline


class ObservedPipeline(Generated):
    """Marks pipelines whose calls begin runs."""

    _noesis: Calls | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by way of the original class, since generated classes cannot be imported."""
        return by_original(super().__reduce_ex__(protocol), type(self), _observed_class)


def _observed_class(original: type) -> type:
    """The subclass of a pipeline class whose calls begin runs, made once."""
    made = subclass_of(original)
    if made is not None:
        return made
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

    return make_subclass(original, ObservedPipeline, __call__=observed_call)


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
        found = {**gathered(self.metas), "pipeline_calls": len(self.metas)}
        recorder.meta = {**recorder.meta, **found, **recorder.given}
        recorder.call_metas = [{**meta, **recorder.given} for meta in self.metas]
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
