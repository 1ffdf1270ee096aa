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


@cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ALL[name].build()


def model_of(entry: Entry) -> nn.Module:
    """The model of an entry, a fresh copy each time, in eval mode."""
    return copy.deepcopy(_built(entry.name)).eval()


def kinds(names: Iterable[str]) -> dict[str, int]:
    """Names with N for each place in a list, and how many there are of each."""
    return dict(Counter(re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "N", name) for name in names))
