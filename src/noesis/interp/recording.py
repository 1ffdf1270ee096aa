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
from ..internals import Attend, AttentionFunctions, around_attention
from ..layers import hidden_state, is_leaf, named_layers, unmeasurable
from .attention import Attention, attention_of

#: By which models of transformers are asked for some logits alone.
LOGITS_TO_KEEP = "logits_to_keep"


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
    elsewhere: dict[str, bool]  # by name of such a module: whether it was given other tokens beside the hidden state


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
    recording = _Recording(root, blocks, ended)
    within = {inner for block in blocks.values() for inner in block.modules()}
    layers = {module for _, module in named_layers(root)}  # a LoRA layer is one, whatever is in it
    watched = {layer for layer in layers if layer in within or is_leaf(layer)} | set(also)
    with ExitStack() as leaving, torch.no_grad():
        for module in watched - {root}:
            leaving.callback(module.register_forward_pre_hook(recording.begins, with_kwargs=True).remove)
            leaving.callback(module.register_forward_hook(recording.ends, with_kwargs=True).remove)
        leaving.enter_context(around_attention(recording.attends))
        leaving.enter_context(AttentionFunctions(recording.attends_by_functions, recording.running))
        output = call()
    return Recorded(output, recording.around)


class _Recording:
    """What happens in one run, in the thread that began it."""

    def __init__(self, root: nn.Module, blocks: Mapping[str, nn.Module], ended: Callable[[BlockRun], None]) -> None:
        self.names = {module: name for name, module in root.named_modules()}
        self.blocks, self.ended, self.thread = blocks, ended, threading.get_ident()
        self.around: list[Call] = []
        self._stack: list[tuple[nn.Module, Tensor | None]] = []  # modules that run, and what they were given
        self._inside: list[Call] = []
        self._attention: list[tuple[str, nn.Module, Attention | str]] = []
        self._elsewhere: set[str] = set()  # modules that were given other tokens beside the hidden state
        self._open: list[str] = []  # blocks that run
        self._by_interface = 0  # calls of it that go on

    def begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""
        if threading.get_ident() != self.thread:
            return
        given = hidden_input(args, kwargs)
        self._stack.append((module, _copy(given)))
        if _other_tokens(given, (*args, *kwargs.values())):
            self._elsewhere.add(self.names[module])
        if self.names[module] in self.blocks:
            self._open.append(self.names[module])

    def ends(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """A module returns."""
        if threading.get_ident() != self.thread:
            return
        name, (_, given) = self.names[module], self._stack.pop()
        call = Call(name, module, given, _copy(hidden_state(output)))
        if name not in self.blocks:
            (self._inside if self._open else self.around).append(call)
            return
        self._open.pop()
        elsewhere = {attending: attending in self._elsewhere for attending, _, _ in self._attention}
        done = BlockRun(name, call, self._inside, self._attention, elsewhere)
        self._inside, self._attention, self._elsewhere = [], [], set()
        self.ended(done)

    def attends(self, module: nn.Module, given: dict[str, Any], implementation: str, run: Attend) -> Any:
        """A module attends by the interface."""
        if threading.get_ident() != self.thread:
            return run(given)
        self._by_interface += 1
        try:
            result = run(given)
        finally:
            self._by_interface -= 1
        self._attended(module, given, implementation, result)
        return result

    def attends_by_functions(self, module: nn.Module, given: dict[str, Any], implementation: str, run: Attend) -> Any:
        """A module attends by functions of torch, which may be how the interface does it."""
        result = run(given)
        if not self._by_interface:
            self._attended(module, given, implementation, result)
        return result

    def _attended(self, module: nn.Module, given: dict[str, Any], implementation: str, result: Any) -> None:
        if self._open and module in self.names:
            call = attention_of(module, given, implementation, result)
            self._attention.append((self.names[module], module, call))

    def running(self) -> tuple[nn.Module | None, Tensor | None]:
        """The innermost module that runs."""
        return self._stack[-1] if self._stack else (None, None)


def _other_tokens(given: Tensor | None, arguments: Iterable[Any]) -> bool:
    """Whether a module is called with another tensor of three dimensions, as tokens have, than its hidden state."""
    if given is None or given.dim() != 3:
        return False
    others = [each for each in arguments if isinstance(each, Tensor) and each.is_floating_point() and each.dim() == 3]
    return any(each is not given and (each.shape != given.shape or not torch.equal(each, given)) for each in others)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if unmeasurable(tensor) else tensor.detach().clone()  # type: ignore[union-attr]
