"""Inputs through a model, and what is kept of that."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import BadType, BadValue, TooLarge, WrongState
from ..layers import Layer, Layers, choose, hidden_state
from ..wrapping import Wrapped, each_output, resolve
from .kept import OUTPUT, Kept, Predictions, Run, keep
from .weights import weights_of, without_adapters


class Asked(NamedTuple):
    """How models are run.

    Attributes:
        inputs: one each.
        layers: as in `noesis.wrap`.
        call: `(model, input) -> output`; None for what fits model and input.
        seed: of the noise of pipelines.
        elements: how many are kept of each output at most.
        max_bytes: how many of one run altogether.
    """

    inputs: list[Any]
    layers: Layers
    call: Callable[[Any, Any], Any] | None
    seed: int
    elements: int
    max_bytes: int


def listed(inputs: Any) -> list[Any]:
    """Inputs one by one: the rows of a tensor or an array, the elements of a list.

    Examples:
        >>> import torch
        >>> from noesis.diffing.running import listed
        >>> [tuple(each.shape) for each in listed(torch.ones(2, 3))], listed("a coat")
        ([(1, 3), (1, 3)], ['a coat'])
    """
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    if isinstance(inputs, Tensor):
        if not inputs.dim():
            raise BadValue("inputs is a tensor without dimensions", "a tensor [inputs, ...]", "Stack the inputs")
        inputs = list(inputs.split(1))
    elif isinstance(inputs, (str, Mapping, tuple)):
        inputs = [inputs]
    elif isinstance(inputs, Sequence) or hasattr(inputs, "__iter__"):
        inputs = list(inputs)
    else:
        raise BadType(f"inputs is a {type(inputs).__name__}", "a tensor or a list of inputs", "Put it in a list")
    if not inputs:
        raise BadValue("inputs is empty", "at least one input, better 8", "Give some")
    return list(inputs)


def label(given: Any, number: int) -> str:
    """What an input is called: a text by its beginning, others by their number."""
    text = given.get("prompt") if isinstance(given, Mapping) else given
    return f"input {number}" if not isinstance(text, str) else text if len(text) <= 40 else f"{text[:39]}…"


def record(model: Any, tokenizer: Any, asked: Asked) -> Run:
    """Run a model over all inputs, and keep what a comparison needs.

    Args:
        model: an `nn.Module`, a diffusers pipeline, or the result of `noesis.wrap`.
        tokenizer: for texts that a language model or a classifier is given.
        asked: how.

    Raises:
        NoesisError: (a MemoryError) when that would be more than `max_bytes`; (a RuntimeError) when no layer ran.
    """
    called, root, _, pipeline = resolve(model)
    chosen = _chosen(root, asked.layers)
    run = Run(meta=_meta(root, called, pipeline is not None), class_name=_names_of_classes(root, tokenizer))
    recording = _Recording(run, asked)
    quiet: AbstractContextManager[Any] = model.paused() if isinstance(model, Wrapped) else nullcontext()
    with quiet, _restored(root), torch.no_grad(), each_output(chosen, recording.keep):
        for given in asked.inputs:
            recording.begin()
            ready, ids = _ready(given, called, root, tokenizer, pipeline is not None)
            if asked.call is not None:
                output = asked.call(called, ready)
            elif pipeline is not None:
                output = called(**_pipeline_options(called, ready, asked.seed))
            elif isinstance(ready, Mapping):
                output = called(**ready)
            else:
                output = called(*ready) if isinstance(ready, tuple) else called(ready)
            recording.end(output, ready, ids, whole=pipeline is None)
    if not any(set(calls) - {OUTPUT} for calls in run.calls):
        raise WrongState(
            f"None of the {len(chosen)} selected layers of {type(root).__name__} ran",
            "layers that the model calls",
            "Select others; a model that was compiled has to be given as it was before",
        )
    logger.debug("kept {} bytes of {} outputs", recording.held, sum(map(len, run.order)))
    run.never_ran = [layer.name for layer in chosen if layer.name not in {*run.layers, *run.unmeasured}]
    return run


def add_weights(run: Run, model: Any, stays: bool) -> None:
    """Keep a model's weights too; of a pipeline those of all its parts."""
    _, root, _, pipeline = resolve(model)
    parts = {"": root}
    if pipeline is not None:
        modules = {name: each for name, each in model.components.items() if isinstance(each, nn.Module)}
        parts = {f"{name}.": each for name, each in modules.items()}
    run.weights = {}
    for prefix, module in parts.items():
        found, left_out = weights_of(module, stays)
        run.weights |= {prefix + name: weight for name, weight in found.items()}
        run.weights_left_out |= {prefix + name: why for name, why in left_out.items()}


class _Recording:
    """Where the hooks of one run put what they see."""

    def __init__(self, run: Run, asked: Asked) -> None:
        self.run, self.asked, self.held = run, asked, 0

    def begin(self) -> None:
        self.run.calls.append({})
        self.run.order.append([])

    def keep(self, name: str, hidden: Tensor | None) -> None:
        if hidden is None or hidden.layout != torch.strided or hidden.is_nested or hidden.is_meta:
            self.run.unmeasured[name] = "its output holds no dense floating tensor"
            return
        kept: Kept = keep(hidden, self.asked.elements)
        self.held += kept.elements.numel() * kept.elements.element_size()
        if self.held > self.asked.max_bytes:
            raise TooLarge(
                f"Keeping the activations of {len(self.run.calls)} of {len(self.asked.inputs)} inputs would pass "
                f"max_bytes={self.asked.max_bytes}",
                f"at most {self.asked.max_bytes} bytes",
                "Select fewer layers, give fewer inputs, keep fewer elements of each output, or pass more max_bytes",
            )
        calls = self.run.calls[-1].setdefault(name, [])
        self.run.order[-1].append((name, len(calls)))
        calls.append(kept)

    def end(self, output: Any, given: Any, ids: list[int] | None, whole: bool) -> None:
        hidden = hidden_state(output)
        if hidden is not None:
            self.keep(OUTPUT, hidden)
        self.run.predictions.append(_predictions(output, given) if whole else None)
        self.run.tokens.append(ids)


def _chosen(root: nn.Module, layers: Layers) -> list[Layer]:
    """The layers by their names without adapters; one that an adapter is around counts with it."""
    found: dict[str, Layer] = {}
    for layer in choose(root, layers):
        module = layer.module
        if layer.name.endswith(".base_layer"):
            module = root.get_submodule(layer.name.removesuffix(".base_layer"))
        name = without_adapters(layer.name)
        found.setdefault(name, Layer(name, module, layer.place))
    return list(found.values())


@contextmanager
def _restored(root: nn.Module) -> Iterator[None]:
    """What layers in training mode keep of their inputs, such as running means, is afterwards as it was."""
    kept = [
        (buffer, buffer.clone()) for module in root.modules() if module.training for buffer in module.buffers(False)
    ]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


# ---------------------------------------------------------------- inputs


def _ready(given: Any, called: Any, root: nn.Module, tokenizer: Any, pipeline: bool) -> tuple[Any, list[int] | None]:
    """An input as the model takes it, on its device, and the ids of a text."""
    if pipeline:
        return given, None
    if isinstance(given, str):
        if tokenizer is None:
            raise BadValue(
                f"the text {given[:40]!r} is given to {type(called).__name__} without a tokenizer",
                "tokenizer=...",
                "Pass the tokenizer of the model, or tensors",
            )
        ids = list(tokenizer(given)["input_ids"])
        if not ids:
            raise BadValue(
                f"the text {given[:40]!r} has no tokens", "a text with at least one token", "Write something"
            )
        row = torch.tensor([ids])
        given = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        return _moved(given, root), ids
    return _moved(given, root), None


def _device(root: nn.Module) -> torch.device:
    tensor = next(itertools.chain(root.parameters(), root.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _moved(given: Any, root: nn.Module) -> Any:
    """Tensors on the device of the model, and floating ones in its dtype, as a copy in bfloat16 needs them."""
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        number = next((each.dtype for each in _floating(root) if each.element_size() > 1), given.dtype)
        return given.to(_device(root), number if given.is_floating_point() else given.dtype)
    if isinstance(given, Mapping):
        return {name: _moved(value, root) for name, value in given.items()}
    return tuple(_moved(value, root) for value in given) if isinstance(given, tuple) else given


def _pipeline_options(pipeline: Any, given: Any, seed: int) -> dict[str, Any]:
    """What a pipeline is called with: noise from a seed on the CPU, alike for both, and no image decoded unasked."""
    options = dict(given) if isinstance(given, Mapping) else {"prompt": given}
    parameters = inspect.signature(pipeline.__call__).parameters
    if "output_type" in parameters:
        options.setdefault("output_type", "latent")
    if "generator" in parameters:
        own = options.get("generator")
        if own is None:
            own = torch.Generator("cpu").manual_seed(seed)
        options["generator"] = [_twin(each) for each in own] if isinstance(own, list) else _twin(own)
    return options


def _twin(generator: torch.Generator) -> torch.Generator:
    """A generator in the same state: one that was given is there for every run."""
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


# ---------------------------------------------------------------- outputs


def _predictions(output: Any, given: Any) -> Predictions | None:
    """The likeliest classes, of logits [samples, classes] or [batch, tokens, vocabulary]; padding is left out."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or not logits.is_floating_point():
        return None
    if logits.shape[-1] < 2 or logits.layout != torch.strided:
        return None
    rows = logits.reshape(-1, logits.shape[-1])
    mask = given.get("attention_mask") if isinstance(given, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        rows = rows[mask.reshape(-1).bool()]
    found = [part.to(torch.float32).softmax(-1).max(-1) for part in rows.split(256)]
    if not found:
        return None
    values, classes = (torch.cat([each[at] for each in found]).cpu() for at in (0, 1))
    return Predictions(classes, values)


def _names_of_classes(root: nn.Module, tokenizer: Any) -> Callable[[int], str]:
    labels = getattr(getattr(root, "config", None), "id2label", None) or {}
    if tokenizer is not None and "ForCausalLM" in type(_inner(root)).__name__:
        return lambda number: str(tokenizer.convert_ids_to_tokens(number))
    return lambda number: str(labels.get(number, number))


def _inner(root: Any) -> Any:
    """The model that an adapter is around."""
    return root.get_base_model() if callable(getattr(root, "get_base_model", None)) else root


def _meta(root: nn.Module, called: Any, pipeline: bool) -> dict[str, Any]:
    config: Any = getattr(called if pipeline else root, "config", {})
    named = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    dtypes = dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in _floating(root))
    return {
        "model": named or type(called if pipeline else root).__name__,
        "class": type(called if pipeline else root).__name__,
        "dtype": ", ".join(dtypes),
        "device": str(_device(root)),
        "training": root.training,
        "vocabulary": getattr(getattr(root, "config", None), "vocab_size", None),
        "torch_version": torch.__version__,
    }


def _floating(root: nn.Module) -> Iterator[Tensor]:
    return (each for each in root.parameters() if each.is_floating_point())
