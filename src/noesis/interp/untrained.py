"""A copy of a model that has learned nothing: what would be seen if a finding came from the architecture alone."""

from __future__ import annotations

import copy

import torch
from loguru import logger
from torch import Tensor, nn

from .anatomy import called_and_root

#: A model that was made with the same seed would be given the very weights that it began with.
SALT = 0x6E6F65736973


def untrained(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of a model with random weights, in which nothing is learned.

    Modules that know how to begin anew do (`reset_parameters`). Of the others, such as GPT-2's Conv1D and norms of
    transformers, each parameter's elements are shuffled among themselves. Ties between parameters stay, the global
    random state too. The copy takes as much memory as the model.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Linear(4, 4)
        >>> copy = interp.untrained(model)
        >>> torch.equal(copy.weight, model.weight), torch.equal(copy.weight, interp.untrained(model).weight)
        (False, True)

    Args:
        model: an `nn.Module`, or the result of `noesis.wrap`.
        seed: equal seeds give equal weights.

    Raises:
        NoesisError: (a TypeError) for another kind of model; (a ValueError) for a compiled one.
    """
    _, root = called_and_root(model)
    made = copy.deepcopy(root)
    devices = {tensor.device for tensor in made.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(SALT + seed)
        generator = torch.Generator().manual_seed(SALT + seed)
        shuffled = [name for name, module in made.named_modules() if _begin_anew(module, generator)]
    logger.debug("untrained copy of {}: {} modules shuffled, the others reset", type(root).__name__, len(shuffled))
    return made


def _begin_anew(module: nn.Module, generator: torch.Generator) -> bool:
    """Reset a module's own parameters; whether they were shuffled instead."""
    own = [each for each in module.parameters(recurse=False) if each.is_floating_point()]
    reset = getattr(module, "reset_parameters", None)
    if not own:
        return False
    if callable(reset):
        reset()
        return False
    for parameter in own:
        _shuffle(parameter, generator)
    return True


def _shuffle(parameter: Tensor, generator: torch.Generator) -> None:
    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
    parameter.copy_(parameter.reshape(-1)[order].reshape(parameter.shape))
