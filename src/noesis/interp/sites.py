"""Sites: names of places in a model, `component.layer[.head][@position]`, or `module:` and a dotted name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import BadType, BadValue

#: Components of a block, and those of the model as a whole.
LAYERED = (
    *("resid_pre", "resid_mid", "resid_post", "attn", "mlp", "neurons"),
    *("q", "k", "v", "z", "pattern", "result"),
)
WHOLE = ("embed", "logits")
HEADED = ("q", "k", "v", "z", "pattern", "result")
MODULE = "module"

_NUMBERS = r"\*|\d+(?:-\d+)?"
_SITE = re.compile(
    rf"(?P<component>\w+)(?:\.(?P<layers>{_NUMBERS}))?(?:\.(?P<heads>{_NUMBERS}))?(?:@(?P<positions>-?\d+|\d+-\d+))?"
)
_OTHERS = re.compile(r"(?P<begin>(?:blocks\.(?P<layers>\*|\d+(?:-\d+)?)\.)?(?P<name>[\w.]*hook_\w+))(?P<position>@.+)?")
#: TransformerLens' names of the same places.
TRANSFORMER_LENS = {
    "hook_embed": "embed",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "mlp.hook_post": "neurons",
    **{f"attn.hook_{name}": name for name in HEADED},
}


class Site(NamedTuple):
    """One place in a model.

    Examples:
        >>> from noesis.interp import Site
        >>> str(Site("z", 3, 2, -1))
        'z.3.2@-1'
    """

    component: str  # or "module"
    layer: int | None = None
    head: int | None = None
    position: int | None = None  # along the tokens; from the end where negative
    module: str = ""  # its dotted name

    def __str__(self) -> str:
        numbers = "".join(f".{number}" for number in (self.layer, self.head) if number is not None)
        name = f"{MODULE}:{self.module}" if self.component == MODULE else self.component
        return f"{name}{numbers}" + ("" if self.position is None else f"@{self.position}")


class Asked(NamedTuple):
    """What one string asks for, before the model says how many layers and heads there are."""

    text: str
    component: str
    layers: str
    heads: str  # "" for all in one tensor
    positions: tuple[int | None, ...]
    module: str = ""


def read(keep: str | Site | Iterable[str | Site], modules: Sequence[str]) -> list[Asked]:
    """Read sites, ranges of them, names of modules and TransformerLens' names.

    A component goes before a module of the same name, which is written `module:NAME`.

    Examples:
        >>> from noesis.interp.sites import read
        >>> [(asked.component, asked.layers) for asked in read(["z.0-3", "blocks.1.attn.hook_pattern"], [])]
        [('z', '0-3'), ('pattern', '1')]

    Raises:
        NoesisError: (a ValueError) for what is neither a site nor a module, with near names; (a TypeError) for
            another kind of thing.
    """
    if isinstance(keep, (str, Site)):
        keep = [keep]
    if not isinstance(keep, Iterable):
        raise BadType(f"keep is {keep!r}", "sites as strings, such as ['z.3', 'resid_post.*']", "Pass a list of them")
    return [_read(item, modules) for item in keep]


def _read(item: str | Site, modules: Sequence[str]) -> Asked:
    if not isinstance(item, (str, Site)):
        raise BadType(f"keep has {item!r} of type {type(item).__name__}", "sites as strings", "Pass 'z.3', for example")
    text = str(item)
    other = _OTHERS.fullmatch(text)
    name = text
    if other is not None and other["name"] in TRANSFORMER_LENS:
        component = TRANSFORMER_LENS[other["name"]]
        layers = f".{other['layers']}" if other["layers"] else ""
        name = f"{component}{layers}{other['position'] or ''}"
    match = _SITE.fullmatch(name)
    if match is not None and match["component"] in (*LAYERED, *WHOLE):
        component = match["component"]
        if component in WHOLE and (match["layers"] or match["heads"]):
            raise BadValue(f"keep has {text!r}", f"{component!r} alone: it is of no layer", f"Write {component!r}")
        if component not in HEADED and match["heads"]:
            raise BadValue(f"keep has {text!r}, a head", f"heads of {', '.join(HEADED)}", f"{component!r} has none")
        heads, positions = match["heads"] or "", match["positions"]
        return Asked(text, component, match["layers"] or "*", heads, _positions(text, positions))
    module, _, position = text.removeprefix(f"{MODULE}:").partition("@")
    if module in modules and re.fullmatch(r"|-?\d+|\d+-\d+", position):
        return Asked(text, MODULE, "", "", _positions(text, position or None), module)
    raise unknown(text, modules)


def unknown(text: str, modules: Sequence[str]) -> BadValue:
    """The error for a name that is nothing here."""
    head = re.split(r"[.@]", text)[0]
    near = difflib.get_close_matches(head, [*LAYERED, *WHOLE], n=2, cutoff=0.6)
    near += difflib.get_close_matches(text, [*modules, *(f"blocks.0.{name}" for name in TRANSFORMER_LENS)], n=3)
    return BadValue(
        f"keep has {text!r}, which is neither a site nor a module of this model",
        f"component.layer[.head][@position] with one of {', '.join((*LAYERED, *WHOLE))}, or a dotted module name",
        f"Did you mean {', '.join(map(repr, near))}?"
        if near
        else "print(interp.anatomy(model, ...)) lists what there is",
    )


def numbers(text: str, count: int, what: str, asked: str) -> list[int]:
    """The numbers that `*`, `3` or `0-3` stands for, of `count` there are.

    Raises:
        NoesisError: (a ValueError) for a number that is not there.
    """
    if text == "*":
        return list(range(count))
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if low > high or high >= count:
        raise BadValue(
            f"keep has {asked!r}, {what} {text}",
            f"{what}s among 0 to {count - 1}" if count else f"a model in which there are {what}s",
            f"Write {'a range from the smaller to the larger' if low > high else 'one that is there'}",
        )
    return list(range(low, high + 1))


def _positions(text: str, given: str | None) -> tuple[int | None, ...]:
    if given is None:
        return (None,)
    if re.fullmatch(r"-?\d+", given):
        return (int(given),)
    low, high = map(int, given.split("-"))
    if low > high:
        raise BadValue(f"keep has {text!r}, positions {given}", "a range from the smaller to the larger", "Swap them")
    return tuple(range(low, high + 1))
