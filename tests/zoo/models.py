"""All models of the zoo."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from . import of_diffusers, of_torch, of_transformers
from .entry import Entry

ALL = {entry.name: entry for entry in [*of_transformers.ZOO, *of_diffusers.ZOO, *of_torch.ZOO]}


def installed() -> list[str]:
    """Names of the models whose library is there."""
    libraries = [(of_transformers.ZOO, ["transformers"]), (of_diffusers.ZOO, ["diffusers", "transformers"])]
    absent = {entry.name for zoo, needs in libraries if not all(map(find_spec, needs)) for entry in zoo}
    return [name for name in ALL if name not in absent]


#: Lists whose length matters: U-Nets pass on what each resnet gave, and llava takes what the last block but one gives.
COUNTED = ("resnets", "attentions", "vision_tower.encoder.layers")


@cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ALL[name].build()


def model_of(entry: Entry) -> nn.Module:
    """The model of an entry, a fresh copy each time, in eval mode."""
    return copy.deepcopy(_built(entry.name)).eval()


def short(entry: Entry) -> nn.Module:
    """The same with one block of each kind in a row: a compiler does with a second what it does with the first."""
    model = model_of(entry)
    for name, blocks in list(model.named_modules()):
        if not isinstance(blocks, nn.ModuleList) or name.endswith(COUNTED):
            continue
        if kinds(f"{name}.{number}" for number in range(len(blocks))).keys() <= entry.blocks.keys():
            first = {_described(block): block for block in reversed(blocks)}
            model.set_submodule(name, nn.ModuleList(block for block in blocks if block in first.values()))
    return model


def _described(block: nn.Module) -> str:
    """What two blocks of one kind have in common: modules, settings, shapes of parameters."""
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if _is_setting(key, value)})
        for name, module in block.named_modules()
    ]
    return repr((modules, [(name, parameter.shape) for name, parameter in block.named_parameters()]))


def _is_setting(name: str, value: object) -> bool:
    number_of_the_block = name in ("layer_idx", "layer_id")
    return not number_of_the_block and isinstance(value, (bool, int, float, str, type(None)))


def kinds(names: Iterable[str]) -> dict[str, int]:
    """Names with N for each place in a list, and how many there are of each."""
    return dict(Counter(re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "N", name) for name in names))
