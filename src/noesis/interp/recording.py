"""One run of a model in which each module's input and output are seen, a block at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadType
from ..internals import Attend, around_attention
from ..layers import hidden_state, is_leaf, named_layers, unmeasurable
from .attention import Attention, attention_of


class Call(NamedTuple):
    """A module that ran, and copies of what it was given and returned: both may be changed in place afterwards."""

    name: str
    module: nn.Module
    given: Tensor | None
    output: Tensor | None


class BlockRun(NamedTuple):
    """One run of a block, and of what is in it, in the order in which modules ended."""

    name: str
    call: Call
    inside: list[Call]
    attention: list[tuple[str, nn.Module, Attention | str]]  # name of the module


class Recorded(NamedTuple):
    """What a run showed beside its blocks."""

    output: Any
    around: list[Call]  # modules that are in no block: those without children, and those asked for


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state that a module is called with: its first floating tensor, or `hidden_states`."""
    found = hidden_state(args)
    if found is None:
        found = hidden_state(kwargs.get("hidden_states"))
    return hidden_state(dict(kwargs)) if found is None else found


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a mapping of arguments, a tuple of them, or one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def listed(given: Any, name: str) -> list[Any]:
    """Inputs one by one, of a list of them or of one.

    Raises:
        NoesisError: (a TypeError) for texts, and for what is neither.
    """
    every = list(given) if isinstance(given, Iterable) and not isinstance(given, (Tensor, Mapping, str)) else [given]
    if not every or not all(isinstance(each, (Tensor, Mapping)) for each in every):
        kind = type(every[0] if every else given).__name__
        raise BadType(
            f"{name} has a {kind}",
            "what the model is called with: tensors, or arguments by name",
            "Pass [tokenizer(text, return_tensors='pt') for text in texts]",
        )
    return every


def spare(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a run beside the user's own, which must not change what they hold, such as a cache of keys."""

    def own(value: Any) -> Any:
        return value if isinstance(value, Tensor) else copy.deepcopy(value)

    return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}


def record(
    call: Callable[[], Any],
    root: nn.Module,
    blocks: Mapping[str, nn.Module],
    ended: Callable[[BlockRun], None],
    also: Sequence[nn.Module] = (),
) -> Recorded:
    """Run a model, and hand on each block when it ends, so that no more than one is held.

    Args:
        call: runs the model.
        root: the module whose dotted names count.
        blocks: its blocks by name.
        ended: called with each run of a block.
        also: modules to see beside those in blocks and those without children.
    """
    names = {module: name for name, module in root.named_modules()}
    thread = threading.get_ident()
    stack: list[tuple[nn.Module, Tensor | None]] = []
    around: list[Call] = []
    inside: list[Call] = []
    attention: list[tuple[str, nn.Module, Attention | str]] = []
    open_blocks: list[str] = []

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return
        stack.append((module, _copy(hidden_input(args, kwargs))))
        if names[module] in blocks:
            open_blocks.append(names[module])

    def ends(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        name, (_, given) = names[module], stack.pop()
        call = Call(name, module, given, _copy(hidden_state(output)))
        if name in blocks:
            open_blocks.pop()
            done = BlockRun(name, call, list(inside), list(attention))
            inside.clear()
            attention.clear()
            ended(done)
        else:
            (inside if open_blocks else around).append(call)

    def attends(module: nn.Module, given: dict[str, Any], implementation: str, run: Attend) -> Any:
        result = run(given)
        if open_blocks and module in names and threading.get_ident() == thread:
            attention.append((names[module], module, attention_of(module, given, implementation, result)))
        return result

    within = {inner for block in blocks.values() for inner in block.modules()}
    layers = {module for _, module in named_layers(root)}  # a LoRA layer is one, whatever is in it
    watched = {layer for layer in layers if layer in within or is_leaf(layer)} | set(also)
    with ExitStack() as leaving, torch.no_grad():
        for module in watched - {root}:
            leaving.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
            leaving.callback(module.register_forward_hook(ends, with_kwargs=True).remove)
        leaving.enter_context(around_attention(attends))
        output = call()
    return Recorded(output, around)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if unmeasurable(tensor) else tensor.detach().clone()  # type: ignore[union-attr]
