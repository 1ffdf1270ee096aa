"""Sites: names of places in a model, `component.layer[.head][@position]`, or `module:` and a dotted name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from ..errors import BadType, BadValue
from ..results import list_of

#: Components of a block, and those of the model as a whole.
LAYERED = (
    *("resid_pre", "resid_mid", "resid_post", "attn", "mlp", "neurons"),
    *("q", "k", "v", "z", "pattern", "result"),
)
WHOLE = ("embed", "logits")
HEADED = ("q", "k", "v", "z", "pattern", "result")
#: Of the second attention of a block that has two, which looks at other tokens: the same with this in front.
CROSS = tuple(f"cross_{name}" for name in (*HEADED, "attn"))
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
    **{f"cross_attn.hook_{name}": f"cross_{name}" for name in HEADED},
    "hook_cross_attn_out": "cross_attn",
    "hook_resid_mid_cross": "resid_mid",
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

    @property
    def kind(self) -> str:
        """The component, whichever attention of its block it is of."""
        return kind_of(self.component)

    def __str__(self) -> str:
        numbers = "".join(f".{number}" for number in (self.layer, self.head) if number is not None)
        name = f"{MODULE}:{self.module}" if self.component == MODULE else self.component
        return f"{name}{numbers}" + ("" if self.position is None else f"@{self.position}")


def kind_of(component: str) -> str:
    """A component, whichever attention of its block it is of: `z` of `cross_z`."""
    return component.removeprefix("cross_") if component in CROSS else component


class Edge(NamedTuple):
    """From what writes into the residual stream to what reads it.

    Examples:
        >>> from noesis.interp import Edge, Site
        >>> str(Edge(Site("z", 0, 1), Site("k", 1, 2)))
        'z.0.1->k.1.2'
    """

    sender: Site
    receiver: Site

    def __str__(self) -> str:
        return f"{self.sender}->{self.receiver}"


#: What an effect is of.
Cell: TypeAlias = Site | Edge


def cell_of(given: Any) -> Cell:
    """A site or an edge from a file."""
    return Edge(*map(site_of, given)) if len(given) == len(Edge._fields) else site_of(given)


def site_of(given: Any) -> Site:
    """A site from a file."""
    component, layer, head, position, module = given
    list_of(str, [component, module])
    list_of(int, [number for number in (layer, head, position) if number is not None])
    if component not in (*LAYERED, *WHOLE, MODULE):
        raise ValueError(f"{given!r} is no site")
    return Site(component, layer, head, position, module)


class Asked(NamedTuple):
    """What one string asks for, before the model says how many layers and heads there are."""

    text: str
    component: str
    layers: str
    heads: str  # "" for all in one tensor
    positions: tuple[int | None, ...]
    module: str = ""
    asker: str = "keep"  # what errors call who asks


def read(asked: str | Site | Iterable[str | Site], root: nn.Module | None, asker: str = "keep") -> list[Asked]:
    """Read sites, ranges of them, names of modules and TransformerLens' names.

    A component goes before a module of the same name, which is written `module:NAME`.

    Examples:
        >>> from noesis.interp.sites import read
        >>> [(asked.component, asked.layers) for asked in read(["z.0-3", "blocks.1.attn.hook_pattern"], None)]
        [('z', '0-3'), ('pattern', '1')]

    Args:
        asked: what is asked for.
        root: the model, whose modules have names; None where no module is meant.
        asker: what errors call the argument that it is from.

    Raises:
        NoesisError: (a ValueError) for what is neither a site nor a module, with near names; (a TypeError) for
            another kind of thing.
    """
    if isinstance(asked, (str, Site)):
        asked = [asked]
    if not isinstance(asked, Iterable):
        raise BadType(
            f"{asker} is {asked!r}", "sites as strings, such as ['z.3', 'resid_post.*']", "Pass a list of them"
        )
    return [_read(item, root, asker)._replace(asker=asker) for item in asked]


def _read(item: str | Site, root: nn.Module | None, asker: str) -> Asked:
    if not isinstance(item, (str, Site)):
        raise BadType(
            f"{asker} has {item!r} of type {type(item).__name__}", "sites as strings", "Pass 'z.3', for example"
        )
    text = str(item)
    other = _OTHERS.fullmatch(text)
    name = text
    if other is not None and other["name"] in TRANSFORMER_LENS:
        component = TRANSFORMER_LENS[other["name"]]
        layers = f".{other['layers']}" if other["layers"] else ""
        name = f"{component}{layers}{other['position'] or ''}"
    match = _SITE.fullmatch(name)
    if match is not None and match["component"] in (*LAYERED, *CROSS, *WHOLE):
        component = match["component"]
        if component in WHOLE and (match["layers"] or match["heads"]):
            raise BadValue(f"{asker} has {text!r}", f"{component!r} alone: it is of no layer", f"Write {component!r}")
        if kind_of(component) not in HEADED and match["heads"]:
            raise BadValue(f"{asker} has {text!r}, a head", f"heads of {', '.join(HEADED)}", f"{component!r} has none")
        heads, positions = match["heads"] or "", _positions(text, match["positions"], asker)
        return Asked(text, component, match["layers"] or "*", heads, positions)
    module, _, position = text.removeprefix(f"{MODULE}:").partition("@")
    if root is not None and module and has_module(root, module) and re.fullmatch(r"|-?\d+|\d+-\d+", position):
        return Asked(text, MODULE, "", "", _positions(text, position or None, asker), module)
    raise unknown(text, root, asker)


def has_module(root: nn.Module, name: str) -> bool:
    """Whether a model has a module of a name."""
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def unknown(text: str, root: nn.Module | None, asker: str) -> BadValue:
    """The error for a name that is nothing here."""
    head = re.split(r"[.@]", text)[0]
    modules = [name for name, _ in root.named_modules() if name] if root is not None else []
    near = difflib.get_close_matches(head, [*LAYERED, *CROSS, *WHOLE], n=2, cutoff=0.6)
    near += difflib.get_close_matches(text, [*modules, *(f"blocks.0.{name}" for name in TRANSFORMER_LENS)], n=3)
    return BadValue(
        f"{asker} has {text!r}, which is neither a site nor a module of this model",
        f"component.layer[.head][@position] with one of {', '.join((*LAYERED, *CROSS, *WHOLE))}, or a module's name",
        f"Did you mean {', '.join(map(repr, near))}?"
        if near
        else "print(interp.anatomy(model, ...)) lists what there is",
    )


def canonical(text: str) -> str | None:
    """The name of one site in our own words, from one in others'; None for several."""
    try:
        asked = read(text, None)[0]
    except BadValue:
        return text if text.startswith(f"{MODULE}:") else f"{MODULE}:{text}"
    if asked.component in WHOLE:
        return str(Site(asked.component, position=asked.positions[0]))
    single = asked.layers.isdigit() and (not asked.heads or asked.heads.isdigit()) and len(asked.positions) == 1
    head = int(asked.heads) if asked.heads.isdigit() else None
    return str(Site(asked.component, int(asked.layers), head, asked.positions[0])) if single else None


def numbers(text: str, count: int, what: str, asked: Asked) -> list[int]:
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
            f"{asked.asker} has {asked.text!r}, {what} {text}",
            f"{what}s among 0 to {count - 1}" if count else f"a model in which there are {what}s",
            f"Write {'a range from the smaller to the larger' if low > high else 'one that is there'}",
        )
    return list(range(low, high + 1))


def _positions(text: str, given: str | None, asker: str) -> tuple[int | None, ...]:
    if given is None:
        return (None,)
    if re.fullmatch(r"-?\d+", given):
        return (int(given),)
    low, high = map(int, given.split("-"))
    if low > high:
        raise BadValue(
            f"{asker} has {text!r}, positions {given}", "a range from the smaller to the larger", "Swap them"
        )
    return tuple(range(low, high + 1))
