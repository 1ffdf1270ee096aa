"""`layers=...` becomes `[(name, module)]`: one predicate under all the sugar.

| `layers=` | selects |
|---|---|
| `"blocks"` | the repeated blocks of the architecture |
| `"all"` | every submodule that has a forward |
| `"leaves"` | modules without children |
| `"linear"`, `"conv"`, `"norm"` | layers of that kind |
| `"attention"`, `"mlp"` | the outermost attention and feed-forward modules |
| `"routers"` | the routers of Mixture-of-Experts models |
| `"unet"` | everything inside a U-Net's resnets and attentions (the default of v0.1) |
| `"all_linear"`, `"first_linear"` | as in nervecode |
| `"re:^down_blocks"` | names in which the regular expression is found |
| `"model.layers.3"` | the module of that name |
| `"layers.*.mlp"` | a glob over the dotted name, matched from its end; `*` stays within a component, `**` does not |
| `nn.Conv2d` | instances of a class |
| `lambda name, module: ...` | what the predicate accepts |
| `["linear", "head"]` | any of these |
| `"blocks:text"` | a stream of the layers that a preset, name, glob or regular expression selects; a glob, too |
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase, translate
from typing import Any, NamedTuple, cast

from torch import nn

from ..errors import BadType, BadValue
from .blocks import blocks
from .kinds import is_attention, is_conv, is_leaf, is_linear, is_mlp, is_norm, named_layers, router_declarations
from .streams import Place, streams

Predicate = Callable[[str, nn.Module], bool]
Layers = str | type[nn.Module] | Predicate | Iterable["str | type[nn.Module] | Predicate"]


class Layer(NamedTuple):
    """What a row is of: the hidden state of a module, or another stream that it returns."""

    name: str  # dotted; that of a stream stands behind a colon
    module: nn.Module
    place: Place | None  # of the stream in what the module returns; None for the hidden state


#: A selector, and the stream behind it.
_STREAM = re.compile(r"((?:re:)?.*[^:]):([\w*?\[\]!-]+)")
_UNET = re.compile(r"^(?:down_blocks|mid_block|up_blocks)\..*\b(?:resnets|attentions)\.\d")


def select(model: nn.Module, layers: Layers) -> list[tuple[str, nn.Module]]:
    """The submodules of `model` that `layers` means, in the order of `named_modules()`; see `choose`.

    Examples:
        >>> from torch import nn
        >>> from noesis.layers import select
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [name for name, _ in select(model, "linear")]
        ['0', '2']
    """
    return [(layer.name, layer.module) for layer in choose(model, layers)]


def choose(model: nn.Module, layers: Layers) -> list[Layer]:
    """What `layers` means in `model`: submodules, in the order of `named_modules()`, and streams of them.

    Args:
        model: the root; it is never selected itself.
        layers: a preset, a dotted name, a glob, a regular expression (`"re:..."`), a module class,
            a predicate `(name, module) -> bool`, or a list of these. Behind a colon, a string may have the name of a
            stream, or a glob over such names.

    Returns:
        Names, modules and places of streams; a module that is reachable by several names is listed once.

    Raises:
        NoesisError: (a ValueError) when something in `layers` selects nothing, with the near names;
            (a TypeError) when it is of another kind.

    Examples:
        >>> from torch import nn
        >>> from noesis.layers import choose
        >>> class Dual(nn.Module):
        ...     def forward(self, hidden_states, encoder_hidden_states):
        ...         return encoder_hidden_states, hidden_states
        >>> [(layer.name, layer.place) for layer in choose(nn.Sequential(Dual()), ["0", "0:text"])]
        [('0', None), ('0:text', (0,))]
    """
    named = [(name, module) for name, module in named_layers(model) if name]
    if not named:
        raise BadValue(
            f"{type(model).__name__} has no submodules to observe",
            "a model with at least one layer inside",
            "Wrap a module that contains it, for example nn.Sequential(model)",
        )
    meant: dict[int, set[str]] = {}  # streams of each module; its hidden state has no name
    for item in _items(layers):
        accepts = predicate(model, item)
        found = {id(module): {""} for name, module in named if accepts(name, module)}
        for key, names in (found or _streams_meant(model, item, named)).items():
            meant.setdefault(key, set()).update(names)
    chosen: list[Layer] = []
    for name, module in named:
        if "" in meant.get(id(module), ()):
            chosen.append(Layer(name, module, None))
        if meant.get(id(module), set()) - {""}:
            places = streams(module).items()
            chosen += [Layer(f"{name}:{stream}", module, at) for stream, at in places if stream in meant[id(module)]]
    return chosen


def predicate(model: nn.Module, item: Any) -> Predicate:
    """The predicate `(name, module) -> bool` that one selector stands for."""
    if isinstance(item, str):
        if item in PRESETS:
            return PRESETS[item](model)
        if item.startswith("re:"):
            return _regex(item)
        if item in {name for name, _ in named_layers(model)}:
            return lambda name, _: name == item
        glob = re.compile(_glob(item))
        return lambda name, _: glob.search(name) is not None
    if inspect.isclass(item) and issubclass(item, nn.Module):
        kind: type[nn.Module] = item
        return lambda _, module: isinstance(module, kind)
    if callable(item) and not inspect.isclass(item):
        return cast("Predicate", item)
    raise BadType(
        f"layers has {item!r} of type {type(item).__name__}",
        "a preset, a name, a glob, 're:...', a module class, a predicate (name, module) -> bool, or a list of these",
        f"Presets are {', '.join(PRESETS)}",
    )


# ---------------------------------------------------------------- presets


def _of_kind(kind: Callable[[nn.Module], bool]) -> Callable[[nn.Module], Predicate]:
    return lambda _: lambda name, module: kind(module)


def _among(modules: Iterable[nn.Module]) -> Predicate:
    wanted = {id(module) for module in modules}
    return lambda _, module: id(module) in wanted


def _outermost(kind: Predicate) -> Callable[[nn.Module], Predicate]:
    def preset(model: nn.Module) -> Predicate:
        kept: list[tuple[str, nn.Module]] = []
        for name, module in named_layers(model):
            if kind(name, module) and not any(name.startswith(f"{outer}.") for outer, _ in kept):
                kept.append((name, module))
        return _among(module for _, module in kept)

    return preset


def _first_linear(model: nn.Module) -> Predicate:
    return _among([module for _, module in named_layers(model) if is_linear(module)][:1])


def _routers(model: nn.Module) -> Predicate:
    classes = tuple(cls for cls, _ in router_declarations(model))
    if classes:
        return lambda _, module: isinstance(module, classes)
    return lambda _, module: re.search(r"(?:Router|TopKGate)$", type(module).__name__) is not None


def _blocks(model: nn.Module) -> Predicate:
    return _among(blocks(model))


PRESETS: dict[str, Callable[[nn.Module], Predicate]] = {
    "blocks": _blocks,
    "all": _of_kind(lambda _: True),
    "leaves": _of_kind(is_leaf),
    "linear": _of_kind(is_linear),
    "conv": _of_kind(is_conv),
    "attention": _outermost(is_attention),
    "mlp": _outermost(is_mlp),
    "norm": _of_kind(is_norm),
    "routers": _routers,
    "unet": lambda _: lambda name, module: _UNET.search(name) is not None,
    "all_linear": _of_kind(is_linear),
    "first_linear": _first_linear,
}


# ---------------------------------------------------------------- names


def _items(layers: Any) -> list[Any]:
    if isinstance(layers, (list, tuple, set, frozenset)):
        if not layers:
            raise BadValue("layers is empty", "at least one selector", "Leave it out for the repeated blocks")
        return list(layers)
    return [layers]


def _regex(item: str) -> Predicate:
    try:
        pattern = re.compile(item[3:])
    except re.error as error:
        raise BadValue(
            f"layers={item!r} is no regular expression ({error})", "'re:' and a valid pattern", "Check it"
        ) from None
    return lambda name, _: pattern.search(name) is not None


def _glob(item: str) -> str:
    """A pattern for the end of a dotted name, on component borders."""
    parts = []
    for component in item.split("."):
        if component == "**":
            parts.append(r".+")
        else:
            body = translate(component)  # '(?s:...)\\Z' or '(?s:...)\\z'
            parts.append(re.sub(r"\.\*|(?<!\\)\.(?!\*)", lambda m: "[^.]*" if m[0] == ".*" else "[^.]", body[4:-3]))
    return r"(?:^|\.)" + r"\.".join(parts) + r"$"


def _streams_meant(model: nn.Module, item: Any, named: list[tuple[str, nn.Module]]) -> dict[int, set[str]]:
    """The streams of modules that a selector means which as a whole selects no module."""
    match = _STREAM.fullmatch(item) if isinstance(item, str) else None
    base, wanted = match.groups() if match is not None else ("", "")
    accepts = predicate(model, base)
    modules = {name: module for name, module in named if match is not None and accepts(name, module)}
    if not modules:
        raise _nothing(model, item, [name for name, _ in named])
    offered = {name: streams(module) for name, module in modules.items()}
    found = {id(modules[name]): {s for s in there if fnmatchcase(s, wanted)} for name, there in offered.items()}
    if any(found.values()):
        return found
    names = list(dict.fromkeys(stream for there in offered.values() for stream in there))
    raise BadValue(
        f"layers={item!r} means a stream {wanted!r}, which {base!r} of {type(model).__name__} has not",
        f"one of its streams ({', '.join(names)})" if names else "layers whose forward returns several tensors by name",
        f"Use {' or '.join(repr(f'{base}:{name}') for name in names)}"
        if names
        else f"These return one, as far as their source tells: use {base!r}, or output= of wrap",
    )


def _nothing(model: nn.Module, item: Any, names: list[str]) -> BadValue:
    shown = repr(item) if isinstance(item, str) else getattr(item, "__name__", repr(item))
    near: list[str] = []
    if isinstance(item, str):
        near = [n for n in difflib.get_close_matches(item, [*PRESETS, *names], n=4, cutoff=0.5) if n != item][:3]
    examples = near or names[:3]
    return BadValue(
        f"layers={shown} selects nothing in {type(model).__name__}",
        f"a preset ({', '.join(PRESETS)}) or something that matches one of its {len(names)} layers",
        f"{'Did you mean' if near else 'Its layers have names like'}: {', '.join(map(repr, examples))}",
    )
