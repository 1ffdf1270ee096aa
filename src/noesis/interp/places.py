"""Where sites are in a model, and how what passes there is read and replaced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadValue
from ..layers import hidden_state
from .anatomy import Anatomy
from .identifying import Block
from .recording import hidden_input
from .sites import CROSS, HEADED, MODULE, WHOLE, Asked, Site, has_module, kind_of, numbers

BEFORE, AFTER, ATTENTION = "before", "after", "attention"


def check_anatomy(anatomy: Anatomy, root: nn.Module) -> None:
    """Check that an anatomy is of a model.

    Raises:
        NoesisError: (a ValueError) when a block is missing.
    """
    last = anatomy.blocks[-1].name
    if anatomy.model != type(root).__name__ or not has_module(root, last):
        raise BadValue(
            f"anatomy is of another model: of {anatomy.model}, with a block {last!r}",
            f"the anatomy of this {type(root).__name__}",
            "Leave it out",
        )


def needs_anatomy(asked: Iterable[Asked]) -> bool:
    """Whether something is asked for that is known by its component."""
    return any(each.component not in (MODULE, "logits") for each in asked)


def expanded(asked: Iterable[Asked], anatomy: Anatomy | None) -> list[Site]:
    """The single sites that are asked for, each once.

    Raises:
        NoesisError: (a ValueError) for a layer or head that is not there, or what the anatomy refuses.
    """
    return list(dict.fromkeys(site for each in asked for site in _expanded(each, anatomy)))


def _expanded(asked: Asked, anatomy: Anatomy | None) -> list[Site]:
    if asked.component == MODULE:
        return [Site(MODULE, position=position, module=asked.module) for position in asked.positions]
    if asked.component in WHOLE:
        if anatomy is not None and asked.component in anatomy.refused:
            raise _refused(asked, asked.component, anatomy.refused[asked.component])
        return [Site(asked.component, position=position) for position in asked.positions]
    assert anatomy is not None
    found = []
    for layer in numbers(asked.layers, len(anatomy.blocks), "layer", asked):
        block = anatomy.blocks[layer]
        if asked.component in CROSS and block.cross is None:
            if asked.layers == "*" and any(other.cross for other in anatomy.blocks):
                continue  # in an encoder, which has none
            why = block.refused.get(kind_of(asked.component), "the block has no second attention")
            raise _refused(asked, f"{asked.component}.{layer}", why)
        if asked.component in block.refused:
            raise _refused(asked, f"{asked.component}.{layer}", block.refused[asked.component])
        heads: Sequence[int | None] = [None]
        if asked.heads:
            core = block.core(asked.component)
            count = core.kv_heads if kind_of(asked.component) in ("k", "v") else core.heads
            heads = numbers(asked.heads, count, "head", asked)
        found += [Site(asked.component, layer, head, position) for head in heads for position in asked.positions]
    return found


def _refused(asked: Asked, site: str, why: str) -> BadValue:
    return BadValue(
        f"{asked.asker} has {asked.text!r}, and {site} is refused: {why}",
        "a site that was verified",
        "print(interp.anatomy(model, ...)) lists what works; modules are kept by their dotted names",
    )


class Place(NamedTuple):
    """A module, and whether a site is in what it is given, in what it returns, or in how it attends."""

    module: str  # its dotted name, "" for the model
    side: str


def place_of(site: Site, anatomy: Anatomy | None) -> Place:
    """Where what passes a site can be read."""
    if site.component == MODULE:
        return Place(site.module, AFTER)
    if site.component == "logits":
        return Place("", AFTER)
    assert anatomy is not None
    if site.component == "embed":
        return Place(str(anatomy.embed), AFTER)
    assert site.layer is not None
    block: Block = anatomy.blocks[site.layer]
    core = block.core(site.component)
    if site.kind == "result":
        return Place(str(core.out), AFTER)
    if site.kind in HEADED:
        return Place(str(core.attention), ATTENTION)
    name, side = {
        "resid_pre": (block.name, BEFORE),
        "resid_mid": (block.mid, BEFORE),
        "resid_post": (block.name, AFTER),
        "attn": (core.attn, AFTER),
        "mlp": (block.mlp, AFTER),
        "neurons": (block.down, BEFORE),
    }[site.kind]
    return Place(str(name), side)


def change_of(site: Site, anatomy: Anatomy | None) -> Place:
    """Where what passes a site can be changed: the stream after attention is changed by what attention adds to it.

    Raises:
        NoesisError: (a ValueError) where that is not known.
    """
    place = place_of(site, anatomy)
    if site.component != "resid_mid":
        return place
    assert anatomy is not None
    assert site.layer is not None
    block = anatomy.blocks[site.layer]
    if not block.added:
        raise BadValue(
            f"{site} is to be changed, and what attention adds there is not known: {block.refused.get('attn')}",
            "a site that can be changed",
            f"Change resid_pre.{site.layer}, or mlp.{site.layer}",
        )
    return Place(block.added[-1], AFTER)


# ---------------------------------------------------------------- parts of a tensor


def part_of(site: Site, whole: Tensor) -> Tensor:
    """The head and position of a site, of the component's tensor; a view, without these dimensions."""
    part = whole
    if site.position is not None:
        check_position(site, whole, site.position)
        part = part.select(token_axis(site), site.position)
    if site.head is not None:
        part = part.select(_head_axis(site), site.head)
    return part


def with_part(site: Site, whole: Tensor, part: Tensor) -> Tensor:
    """The component's tensor with the site's part replaced."""
    if site.head is not None:
        outer = part_of(site._replace(head=None), whole)
        part = torch.select_scatter(outer, part, _head_axis(site), site.head)
    if site.position is not None:
        part = torch.select_scatter(whole, part, token_axis(site), site.position)
    return part


def narrowed(value: Tensor, wider: Site, site: Site) -> Tensor:
    """The part of a site, of what was kept of one that holds it."""
    if site.position is not None and wider.position is None:
        axis = token_axis(site) - (site.kind == "pattern" and wider.head is not None)
        check_position(site, value, site.position)
        value = value.select(axis, site.position)
    if site.head is not None and wider.head is None:
        value = value.select(_head_axis(site), site.head)
    return value


def _head_axis(site: Site) -> int:
    """The dimension of the heads, once the position is taken."""
    return 1 if site.kind == "pattern" else 2 - (site.position is not None)


def token_axis(site: Site) -> int:
    """The dimension of the tokens: of a pattern, that of the queries."""
    return 2 if site.kind == "pattern" else 1


def check_position(site: Site, whole: Tensor, position: int) -> None:
    """Check that a position is one of a tensor's.

    Raises:
        NoesisError: (a ValueError) when it is not.
    """
    axis = token_axis(site)
    if whole.dim() < 3 or not -whole.shape[axis] <= position < whole.shape[axis]:
        shape = "x".join(map(str, whole.shape))
        raise BadValue(
            f"{site} is a position of a tensor of shape {shape}"
            if site.position is not None
            else f"position {position} of {site}, a tensor of shape {shape}",
            f"[batch, tokens, ...] with {position} among the tokens",
            "Leave out the position",
        )


# ---------------------------------------------------------------- in its place


def with_hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[Any, Any]:
    """Arguments of a call with another hidden state."""
    old = hidden_input(args, kwargs)
    if hidden_state(args) is not None:
        return _replaced(args, old, new), kwargs
    return args, _replaced(kwargs, old, new)


def with_hidden_state(output: Any, old: Tensor, new: Tensor) -> Any:
    """What a module returned, with a tensor of it replaced; nothing that it returned is changed."""
    return _replaced(output, old, new)


def _replaced(value: Any, old: Tensor | None, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, tuple):
        items = [_replaced(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    if isinstance(value, dict):
        made = copy.copy(value)  # of its own kind, such as transformers' outputs
        for name, item in value.items():
            if (changed := _replaced(item, old, new)) is not item:
                made[name] = changed
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: _replaced(getattr(value, f.name), old, new) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changes)
    return value
