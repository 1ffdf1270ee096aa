"""The blocks of a model, by its shape alone."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .kinds import children, is_leaf, named_layers


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of an architecture, outermost first found.

    A block is a member of a ModuleList or Sequential with at least two weight matrices (a convolution
    with its norm is a layer, not a block). A stage, that is a member whose own lists of blocks hold
    most of its parameters (a U-Net's down block, a transformer inside it), is opened and its blocks
    are taken. A model without repeated blocks is as deep as its layers: the members of its
    Sequentials, and its other layers that hold parameters.
    """
    found: list[nn.Module] = []
    _collect(model, found)
    if len(found) > 1 or (found and not _in_sequential(model, found[0])):
        return found
    sequentials = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    members = {id(child) for parent in sequentials for child in _entries(parent)}
    return [
        module
        for name, module in named_layers(model)
        if name and is_leaf(module) and (id(module) in members or _size(module))
    ]


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    for child in _entries(module):
        if any(child is block for block in found):
            continue
        if _is_list(module) and _is_block(child):
            found.append(child)
        else:
            _collect(child, found)


def _is_block(module: nn.Module) -> bool:
    if _is_list(module):
        # A Sequential is a block when there is nothing larger than layers in it.
        return isinstance(module, nn.Sequential) and _size(module) > 0 and all(is_leaf(m) for m in _entries(module))
    if _matrices(module) < 2:
        return False
    inner = [child for child in _entries(module) if _is_list(child) and _repeats_one_class(child)]
    return 2 * sum(map(_size, inner)) < _size(module)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _entries(module: nn.Module) -> list[nn.Module]:
    return [child for _, child in children(module)]


def _repeats_one_class(module: nn.Module) -> bool:
    """A list of blocks of one class. Of several classes, it holds the parts of one block (T5's `layer`)."""
    entries = _entries(module)
    return len({type(entry) for entry in entries}) == 1 and all(_matrices(entry) > 1 for entry in entries)


def _in_sequential(model: nn.Module, block: nn.Module) -> bool:
    return any(block is child for m in model.modules() if isinstance(m, nn.Sequential) for child in _entries(m))


def _matrices(module: nn.Module) -> int:
    own = sum(1 for p in module.parameters() if isinstance(p, UninitializedParameter) or p.dim() > 1)
    return own + _packed(module)


def _size(module: nn.Module) -> int:
    own = sum(0 if isinstance(p, UninitializedParameter) else p.numel() for p in module.parameters())
    return own + _packed(module)  # whose size is not known without unpacking them; it is not nothing


def _packed(module: nn.Module) -> int:
    """Weights that torch.ao has quantised, which are no parameters any more."""
    return sum(1 for inner in module.modules() if "_packed_params" in vars(inner))
