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
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from typing import Any, cast

from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..errors import BadType, BadValue
from ..internals.libraries import capture_declarations

Predicate = Callable[[str, nn.Module], bool]
Layers = str | type[nn.Module] | Predicate | Iterable["str | type[nn.Module] | Predicate"]

# Called by nobody: holders of other modules.
_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Children that compute or keep the weights of a layer, which is one layer with them (parametrize, torch.ao).
_WEIGHTS = {"parametrizations", "_packed_params", "_all_weight_values"}
_UNET = re.compile(r"^(?:down_blocks|mid_block|up_blocks)\..*\b(?:resnets|attentions)\.\d")
_ATTENTION = re.compile(r"(?:Attention|Attn)\d*$")
_MLP = re.compile(r"(?:MLP|Mlp|FeedForward|FFN|SparseMoeBlock)\d*$")
_MLP_NAMES = {"mlp", "ff", "ffn", "feed_forward", "feedforward"}


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
        >>> from noesis.layers.selecting import select
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


def named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without holders and without the inside of what counts as one layer.

    A LoRA layer of PEFT, a parametrized and a quantised layer are one layer under the name they had before.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if not isinstance(module, _HOLDERS):
            yield name, module
        for key, child in children(module):
            yield from walk(child, f"{name}.{key}" if name else key)

    yield from walk(module, prefix)


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named children that are layers; none for a module that counts as one layer."""
    if hasattr(module, "base_layer"):  # PEFT: base_layer, lora_A and lora_B act as one
        return []
    return [(name, child) for name, child in module.named_children() if name not in _WEIGHTS]


# ---------------------------------------------------------------- kinds of layers


def is_leaf(module: nn.Module) -> bool:
    """Has a forward and nothing inside."""
    return not children(module) and not isinstance(module, _HOLDERS)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its kin: GPT-2's Conv1D, quantised linears, PEFT's layers around them."""
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return is_linear(base)
    name = type(module).__name__
    return isinstance(module, nn.Linear) or (is_leaf(module) and (name == "Conv1D" or "Linear" in name))


def is_conv(module: nn.Module) -> bool:
    """The convolutions of torch.nn, with PEFT's layers around them."""
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.modules.conv._ConvNd)


def is_norm(module: nn.Module) -> bool:
    """Normalisation layers, told by the class name: LayerNorm, LlamaRMSNorm, BatchNorm2d, AdaLayerNorm."""
    return "Norm" in type(module).__name__ and not isinstance(module, nn.Sequential)


def is_attention(_: str, module: nn.Module) -> bool:
    """Attention modules, told by the class name; a block that contains one is not one."""
    name = type(module).__name__
    return _ATTENTION.search(name) is not None and "Block" not in name


def is_mlp(name: str, module: nn.Module) -> bool:
    """Feed-forward modules, told by the class name or the attribute name."""
    return _MLP.search(type(module).__name__) is not None or (
        name.rpartition(".")[2] in _MLP_NAMES and not is_leaf(module) and not isinstance(module, _HOLDERS)
    )


def router_declarations(model: nn.Module) -> list[tuple[type[nn.Module], int]]:
    """The router classes a transformers model declares, with the place of the logits in their output.

    Source: `_can_record_outputs["router_logits"]` of the model and of its parts.
    """
    found: list[tuple[type[nn.Module], int]] = []
    for module in model.modules():
        found += [each for each in capture_declarations(type(module), "router_logits") if each not in found]
    return found


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


# ---------------------------------------------------------------- blocks


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
    members = {id(child) for parent in model.modules() if isinstance(parent, nn.Sequential) for child in parent}
    return [
        module
        for name, module in named_layers(model)
        if name and is_leaf(module) and (id(module) in members or _size(module))
    ]


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    for child in _entries(module) if _is_list(module) else [child for _, child in children(module)]:
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
    inner = [child for _, child in children(module) if _is_list(child) and _repeats_one_class(child)]
    return 2 * sum(map(_size, inner)) < _size(module)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _entries(module: nn.Module) -> list[nn.Module]:
    return list(module.children())


def _repeats_one_class(module: nn.Module) -> bool:
    """A list of blocks of one class. Of several classes, it holds the parts of one block (T5's `layer`)."""
    entries = _entries(module)
    return len({type(entry) for entry in entries}) == 1 and all(_matrices(entry) > 1 for entry in entries)


def _in_sequential(model: nn.Module, block: nn.Module) -> bool:
    return any(block is child for m in model.modules() if isinstance(m, nn.Sequential) for child in m.children())


def _matrices(module: nn.Module) -> int:
    own = sum(1 for p in module.parameters() if isinstance(p, UninitializedParameter) or p.dim() > 1)
    return own + _packed(module)


def _size(module: nn.Module) -> int:
    own = sum(0 if isinstance(p, UninitializedParameter) else p.numel() for p in module.parameters())
    return own + _packed(module)  # whose size is not known without unpacking them; it is not nothing


def _packed(module: nn.Module) -> int:
    """Weights that torch.ao has quantised, which are no parameters any more."""
    return sum(1 for inner in module.modules() if "_packed_params" in vars(inner))


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
