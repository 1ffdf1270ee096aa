"""The streams of a module: what it returns beside its hidden state, such as the text in SD3's and Flux's blocks.

Each may have a row of its own, and rows are made before the model runs. So it is the source of `forward` that tells:
`return encoder_hidden_states, hidden_states` says which streams there are, what they are called and where they lie.
Where that cannot be read, diffusers' registry of blocks may know.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import Tensor, nn

from ..internals import declared_streams, inside
from .outputs import hidden_state

#: Where in an output: the keys of the tuples, lists and dicts on the way.
Place = tuple["int | str", ...]

_HIDDEN, _STATES = "hidden_states", "_hidden_states"


def hidden_index(module: nn.Module) -> int | None:
    """Which element of what a module returns is its hidden state; None where only the output can tell.

    Examples:
        >>> from torch import nn
        >>> from noesis.layers.streams import hidden_index
        >>> class Dual(nn.Module):
        ...     def forward(self, hidden_states, encoder_hidden_states):
        ...         return encoder_hidden_states, hidden_states
        >>> hidden_index(nn.Linear(2, 2)), hidden_index(Dual())
        (None, 1)
    """
    places, declared = _places(module)
    place = places.get(next((name for name in (_HIDDEN, *declared) if name in places), ""), ())
    return place[0] if len(place) == 1 and isinstance(place[0], int) else None


def streams(module: nn.Module) -> dict[str, Place]:
    """Where a module returns what beside its hidden state.

    A stream is named as `forward` names it in its return statement, without the ending `_hidden_states`; but
    `encoder_hidden_states` is `text`.

    Examples:
        >>> from torch import nn
        >>> from noesis.layers.streams import streams
        >>> class Dual(nn.Module):
        ...     def forward(self, hidden_states, encoder_hidden_states):
        ...         return encoder_hidden_states, hidden_states
        >>> streams(nn.Linear(2, 2)), streams(Dual())
        ({}, {'text': (0,)})
    """
    index = hidden_index(module)
    places, _ = _places(module)
    found: dict[str, Place] = {}
    for variable, place in places.items():
        first = not any(place) if index is None else place == (index,)
        if not first:
            name = "text" if variable == f"encoder{_STATES}" else variable.removesuffix(_STATES)
            found[variable if name in found else name] = place
    return found


def stream(output: Any, place: Place) -> Tensor | None:
    """The tensor at a place of an output; None where this output has none there."""
    for key in place:
        if isinstance(output, dict):
            output = output.get(key)
        elif isinstance(output, (tuple, list)) and isinstance(key, int) and key < len(output):
            output = output[key]
        else:
            return None
    return hidden_state(output)


# ---------------------------------------------------------------- what the source says


def _places(module: nn.Module) -> tuple[dict[str, Place], dict[str, int]]:
    """Where a module returns which of its variables, as its source says, or else diffusers, whose word comes beside."""
    module = inside(module)
    declared = declared_streams(module)
    forward: Any = getattr(module, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    returned = _returned_by(code) if isinstance(code, CodeType) else {}
    return {**{name: (index,) for name, index in declared.items()}, **returned}, declared


@functools.lru_cache(maxsize=1024)
def _returned_by(code: CodeType) -> dict[str, Place]:
    try:
        source = inspect.getsource(code)
        tree = ast.parse(f"if 1:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError, ValueError):  # not there, or not of whole lines
        return {}
    function = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if function is None or function.name != code.co_name:  # the file has changed since
        return {}
    arguments = frozenset(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    variables: dict[str, set[Place]] = {}
    mentions: dict[str, set[Place]] = {}
    for node in _within(function):
        for place, value in _leaves(node.value) if isinstance(node, ast.Return) and node.value is not None else ():
            if place and isinstance(place[-1], str):
                variables.setdefault(place[-1], set()).add(place)
            elif place and isinstance(value, ast.Name):
                variables.setdefault(value.id, set()).add(place)
            elif place:
                mentioned = {name.id for name in ast.walk(value) if isinstance(name, ast.Name)} & arguments
                for name in mentioned if len(mentioned) == 1 else ():
                    mentions.setdefault(name, set()).add(place)
    # What lies here or there, as returns go, cannot be told from something else.
    return {name: place for name, (place, *others) in {**mentions, **variables}.items() if not others}


def _within(node: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a function, and to no function inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from _within(child)


def _leaves(value: ast.expr, place: Place = ()) -> Iterator[tuple[Place, ast.expr]]:
    """The parts of a returned value, and where they lie in it."""
    if isinstance(value, (ast.Tuple, ast.List)):
        for index, element in enumerate(value.elts):
            if isinstance(element, ast.Starred):  # what follows may lie anywhere
                return
            yield from _leaves(element, (*place, index))
    elif isinstance(value, ast.Dict):
        for key, element in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield from _leaves(element, (*place, key.value))
    elif isinstance(value, ast.IfExp):
        yield from _leaves(value.body, place)
        yield from _leaves(value.orelse, place)
    else:
        yield place, value
