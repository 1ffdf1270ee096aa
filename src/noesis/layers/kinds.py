"""What kind of layer a module is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..internals import capture_declarations

# Called by nobody: holders of other modules.
_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# What torch puts around a module to run it otherwise, and leaves out of the names of parameters too.
_AROUND = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Children that compute or keep the weights of a layer, which is one layer with them (parametrize, torch.ao).
_WEIGHTS = {"parametrizations", "_packed_params", "_all_weight_values"}
_ATTENTION = re.compile(r"(?:Attention|Attn)\d*$")
_MLP = re.compile(r"(?:MLP|Mlp|FeedForward|FFN|SparseMoeBlock)\d*$")
_MLP_NAMES = {"mlp", "ff", "ffn", "feed_forward", "feedforward"}


def named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without holders and without the inside of what counts as one layer.

    A LoRA layer of PEFT, a parametrized and a quantised layer are one layer under the name they had before; a module
    that activation checkpointing or FSDP has put a parent around keeps its name.
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
    return [(name, _within(child)) for name, child in module.named_children() if name not in _WEIGHTS]


def _within(module: nn.Module) -> nn.Module:
    for name in _AROUND:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _within(inner)
    return module


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
