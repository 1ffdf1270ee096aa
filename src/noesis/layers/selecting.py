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
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from typing import Any, cast

from torch import nn

from ..errors import BadType, BadValue
from .blocks import blocks
from .kinds import is_attention, is_conv, is_leaf, is_linear, is_mlp, is_norm, named_layers, router_declarations

Predicate = Callable[[str, nn.Module], bool]
Layers = str | type[nn.Module] | Predicate | Iterable["str | type[nn.Module] | Predicate"]

_UNET = re.compile(r"^(?:down_blocks|mid_block|up_blocks)\..*\b(?:resnets|attentions)\.\d")


def select(model: nn.Module, layers: Layers) -> list[tuple[str, nn.Module]]:
    """The submodules of `model` that `layers` means, in the order of `named_modules()`.

    Args:
        model: the root; it is never selected itself.
        layers: a preset, a dotted name, a glob, a regular expression (`"re:..."`), a module class,
            a predicate `(name, module) -> bool`, or a list of these.

    Returns:
        Pairs of dotted name and module; a module that is reachable by several names is listed once.

    Raises:
        NoesisError: (a ValueError) when something in `layers` selects nothing, with the near names;
            (a TypeError) when it is of another kind.

    Example:
        >>> from torch import nn
        >>> from noesis.layers import select
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [name for name, _ in select(model, "linear")]
        ['0', '2']
    """
    named = [(name, module) for name, module in named_layers(model) if name]
    if not named:
        raise BadValue(
            f"{type(model).__name__} has no submodules to observe",
            "a model with at least one layer inside",
            "Wrap a module that contains it, for example nn.Sequential(model)",
        )
    chosen: set[int] = set()
    for item in _items(layers):
        accepts = predicate(model, item)
        found = {id(module) for name, module in named if accepts(name, module)}
        if not found:
            raise _nothing(model, item, [name for name, _ in named])
        chosen |= found
    return [(name, module) for name, module in named if id(module) in chosen]


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
