"""What diffusers, transformers and torch.distributed say of their own modules and groups, if they are loaded."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from loguru import logger
from torch import nn

from .lookup import attribute


@functools.cache
def _said_once(missing: str, instead: str) -> None:
    logger.warning("this version has no {} as noesis knows it; instead, {}", missing, instead)


def _block_registry() -> Any:
    """Diffusers' registry of transformer blocks; None without diffusers, or where it has none."""
    helpers = sys.modules.get("diffusers.hooks._helpers")
    if helpers is None:  # no diffusers in this process, so no diffusers block either
        return None
    registry = attribute(helpers, "TransformerBlockRegistry")
    if not (callable(attribute(registry, "get")) and callable(attribute(registry, "register"))):
        _said_once(
            "diffusers.hooks._helpers.TransformerBlockRegistry",
            "blocks with two streams are measured by the first, and diffusers' caches do not know observed blocks",
        )
        return None
    return registry


def _declared(cls: type) -> Any:
    """What the registry says of a class; None if nothing."""
    registry = _block_registry()
    try:
        return None if registry is None else registry.get(cls)
    except Exception:  # a ValueError today
        return None


def declared_streams(module: nn.Module) -> dict[str, int]:
    """Where diffusers' registry says a block's streams are among its outputs, by the names of its arguments.

    The hidden states come first. The dual-stream blocks of SD3 and Flux return (text, image), and theirs is the image.
    """
    for cls in type(module).__mro__:
        metadata = _declared(cls)
        if metadata is not None:
            found = {}
            for role in ("hidden_states", "encoder_hidden_states"):
                index = attribute(metadata, f"return_{role}_index")
                if not isinstance(index, int):
                    break
                found[attribute(metadata, f"{role}_argument_name") or role] = index
            return found
    return {}


def register_block(original: type[nn.Module], made: type[nn.Module]) -> None:
    """Tell diffusers that a class made from one of its blocks is such a block too.

    Its caches (FirstBlockCache, MagCache) and layer skipping look blocks up by their exact class.
    """
    metadata = _declared(original)
    if metadata is None:
        return
    try:  # a copy, since registering writes the class into what it is given
        _block_registry().register(made, dataclasses.replace(metadata))
    except Exception as error:
        _said_once(f"way to register blocks ({error!r})", "diffusers' caches do not know observed blocks")


def capture_declarations(cls: type, kind: str) -> list[tuple[type[nn.Module], int]]:
    """The classes whose outputs of a kind a transformers model declares, with the place of it in their output."""
    declared = attribute(cls, "_can_record_outputs")
    entries = declared.get(kind, []) if isinstance(declared, Mapping) else []
    found: list[tuple[type[nn.Module], int]] = []
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        # A bare class stands for the library's default index 1; a recorder names its own.
        target, index = getattr(entry, "target_class", entry), getattr(entry, "index", 1)
        if isinstance(target, type) and isinstance(index, int):
            found.append((target, index))
    return found


def device_kinds(group: Any) -> list[str]:
    """The kinds of devices that a process group sends from."""
    kinds = attribute(group, "_device_types")
    if isinstance(kinds, (list, tuple)) and kinds:
        return [device.type for device in kinds]
    backend = str(torch.distributed.get_backend(group))
    return ["cuda"] if "nccl" in backend else ["cpu"]


def rendezvous() -> Any:
    """The store by which the processes of the default group found each other; None where it cannot be had."""
    ask = attribute(torch.distributed.distributed_c10d, "_get_default_store")
    store = ask() if callable(ask) else None
    return store if isinstance(store, torch.distributed.Store) else None  # type: ignore[attr-defined]
