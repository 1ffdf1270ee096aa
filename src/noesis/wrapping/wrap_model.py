"""`wrap`: choose layers, have them observed, and hand out the container that answers questions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from torch import nn

from .._version import __version__
from ..errors import BadType, BadValue, WrongState
from ..internals import inside, rebind
from ..layers import Layers, choose, find_routers, parts_of
from ..observing import Channels, GradientRecorder, Recorder, Weights, observe, site_of
from ..results import ALWAYS, OPTIONAL, asked_for
from ..surprise import Codebook, Scorer
from .with_codebooks import check_codebook, logits_module
from .wrapped import Wrapped, check_numbers, few

if TYPE_CHECKING:
    pass

#: Samples there is room for at first with `per_sample=True`; eager code makes more when a batch needs them.
FIRST_SAMPLES = 8


def wrap(
    model: Any,
    layers: Layers = "blocks",
    *,
    stats: Sequence[str] = ALWAYS,
    per_sample: bool | int = False,
    every: int = 1,
    capacity: int = 256,
    gradients: bool = False,
    parameters: bool = False,
    codebook: Codebook | None = None,
    logits: str | Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> Wrapped:
    """Observe chosen layers of a model, in place and reversibly, without changing what it computes.

    Args:
        model: an `nn.Module`, or a diffusers pipeline (its denoisers are taken).
        layers: what to observe: a preset (`"blocks"`, `"all"`, `"leaves"`, `"linear"`, `"conv"`,
            `"attention"`, `"mlp"`, `"norm"`, `"routers"`, `"unet"`, `"all_linear"`,
            `"first_linear"`), a dotted name, a glob, `"re:..."`, a module class, a predicate
            `(name, module) -> bool`, or a list of these. `"blocks:text"` and the like mean another stream that
            layers return, of which each has a row of its own.
        stats: beside count, mean, std, abs_mean, min, max and nonfinite, which are always there,
            any of `"zeros"` (number of zero elements), `"rms"` (root mean square), and `"kurtosis"` (in excess of the
            normal distribution's; NaN where elements do not differ) with `"skewness"`, which come together.
        per_sample: keep a row per batch element too. An int is the largest batch there will be,
            which compiled code has to know; eager code makes room as needed.
        every: observe every n-th forward; `wrapped.every` changes it later.
        capacity: steps the ring holds; totals and soulprint cover the whole run regardless.
        gradients: keep a row for the gradient by each layer's output too, see `wrapped.gradients()`; in eager code.
        parameters: have `wrapped.weigh()` measure all parameters, their gradients and their updates, see there.
        codebook: have layers keep what `calibrate`, `surprise` and `coding_loss` need.
        logits: the module whose output are the logits, by name, or a callable from the model's output to them;
            how unsure they are then counts towards surprise.
        output: picks the tensor to measure from what a layer returns; by default its hidden state,
            that is what its forward or diffusers calls so, or the first floating tensor. Streams that were
            selected by name are measured beside it.

    Returns:
        The container, which runs the model when called.

    Raises:
        NoesisError: when `layers` selects nothing, a statistic is unknown, a number is out of
            range, a layer cannot be observed, or the model is wrapped already with other settings.

    Examples:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> wrapped = noesis.wrap(model, layers="linear")
        >>> wrapped(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> wrapped.trace()["count"]
        array([[24.,  6.]])
        >>> wrapped.unwrap() is model
        True
    """
    kept_stats = _check_stats(stats)
    check_codebook(codebook, logits)
    if output is not None and not callable(output):
        raise BadType(f"output={output!r}", "a callable from a layer's output to a tensor", "Leave output out")
    for name, value in (("gradients", gradients), ("parameters", parameters)):
        if not isinstance(value, bool):
            raise BadType(f"{name}={value!r}", "True or False", f"Leave {name} out for none")
    samples = FIRST_SAMPLES if per_sample is True else per_sample
    check_numbers(every=every, capacity=capacity, per_sample=1 if samples is False else samples)
    called, root, roots, pipeline = resolve(model)
    chosen = choose(root, layers)
    settings: dict[str, Any] = {
        "layers": [layer.name for layer in chosen],
        "stats": kept_stats,
        "per_sample": per_sample,
        "every": every,
        "capacity": capacity,
        "gradients": gradients,
        "parameters": parameters,
        "codebook": codebook,
        "logits": logits,
        "output": output,
    }
    before = _observed_already(root, roots, settings)
    if before is not None:
        return Wrapped(called, root, before, pipeline)
    names, device = settings["layers"], _device(root)
    given: dict[str, Any] = {"capacity": capacity, "samples": int(samples), "every": every, "stats": kept_stats}
    recorder = Recorder(names, device, **given, settings=settings)
    if gradients:
        recorder.gradients = GradientRecorder(names, device, **given, settings={})
    if parameters:
        recorder.weights = Weights(dict(root.named_parameters()), capacity)
    recorder.count_routes(find_routers(root, [(each.name, each.module) for each in chosen if each.place is None]))
    if codebook is not None:
        recorder.channels = Channels(codebook, logits if callable(logits) else None)
    parts = (
        parts_of(root, [layer.module for layer in chosen]) if pipeline is None else []
    )  # a pipeline calls its denoisers
    observe(recorder, root, chosen, roots, parts, output, logits_module(root, logits))
    if codebook is not None and (channels := recorder.channels) is not None:
        seen = channels.doubt is not None
        recorder.scorer = Scorer(
            codebook, channels.layers, device, logits=seen, head=channels.head, padding=channels.padding.found
        )
    recorder.evidence.unreached = not rebind(called)
    recorder.base_meta = _describe(root, layers)
    recorder.reset({})
    wrapped = Wrapped(called, root, recorder, pipeline)
    logger.debug("observing {} layers of {}", len(chosen), type(root).__name__)
    return wrapped


# ---------------------------------------------------------------- checks


def _check_stats(stats: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stats, Iterable):
        raise BadType(f"stats={stats!r}", f"names among {', '.join(ALWAYS + OPTIONAL)}", "Leave stats out")
    given = (stats,) if isinstance(stats, str) else tuple(stats)
    unknown = [name for name in given if name not in ALWAYS + OPTIONAL]
    if unknown:
        raise BadValue(
            f"stats has {unknown[0]!r}",
            f"any of {', '.join(ALWAYS + OPTIONAL)}",
            f"{', '.join(ALWAYS)} are always there; add {' or '.join(OPTIONAL)} if you want them",
        )
    return asked_for(given)


def _observed_already(root: nn.Module, roots: list[nn.Module], settings: dict[str, Any]) -> Recorder | None:
    """The recorder of a model that is wrapped with these very settings; None for one that is not wrapped.

    Raises:
        NoesisError: when it is wrapped with others.
    """
    found = {id(site.recorder): site.recorder for site in map(site_of, root.modules()) if site is not None}
    if not found:
        return None
    recorder: Recorder = next(iter(found.values()))
    at_roots = [site_of(module) for module in roots]
    ours = all(site is not None and site.root and site.recorder is recorder for site in at_roots)
    if len(found) > 1 or not ours or recorder.settings != settings:
        raise WrongState(
            f"{type(root).__name__} is wrapped already, with other settings (layers {few(recorder.names)})",
            "a model that is not wrapped, or the same settings",
            "Call noesis.unwrap(model) first",
        )
    return recorder


def resolve(model: Any) -> tuple[Any, nn.Module, list[nn.Module], Any]:
    """What to call, where layers are selected, whose forwards are steps, and the pipeline around it."""
    if isinstance(model, Wrapped):
        model = model.observed_model
    if isinstance(model, nn.Module):
        root = inside(model)
        return model, root, [root], None
    if hasattr(model, "components") and callable(model):
        from ..observing import Pipeline  # only a pipeline needs it

        pipeline = Pipeline(model)
        root, roots = pipeline.denoisers()
        return model, root, roots, pipeline
    raise BadType(
        f"model is of type {type(model).__name__}", "an nn.Module or a diffusers pipeline", "Pass the model itself"
    )


def _device(root: nn.Module) -> torch.device:
    tensor = next(itertools.chain(root.parameters(), root.buffers()), None)
    return torch.device("cpu") if tensor is None or tensor.device.type == "meta" else tensor.device


def _describe(root: nn.Module, layers: Any) -> dict[str, Any]:
    config: Any = getattr(root, "config", None)
    named = getattr(config, "_name_or_path", None)  # transformers; diffusers keeps it as an entry
    if isinstance(config, Mapping):
        named = named or config.get("_name_or_path")
    return {
        "model": str(named or type(root).__name__),
        "class": type(root).__name__,
        "layers": layers if isinstance(layers, str) else repr(layers),
        "device": str(_device(root)),
        "dtype": str(next((p.dtype for p in root.parameters()), "")).removeprefix("torch."),
        "noesis_version": __version__,
        "torch_version": torch.__version__,
    }
