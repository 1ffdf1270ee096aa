"""Giving modules their classes back without the container: for good, or for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..errors import BadType
from ..internals import rebind
from ..observing import Pipeline, detach, plain
from .wrapped import Wrapped


def unwrap(model: Any) -> Any:
    """Give every module of a model its own class back, whoever wrapped it.

    It needs no container: a notebook may have lost it, and copies and parts of an observed model have none.

    Args:
        model: a module, a diffusers pipeline, or what `noesis.wrap` or `torch.compile` returned for one.

    Returns:
        The model; of a container, the model or pipeline in it.

    Raises:
        NoesisError: for anything else.

    Examples:
        >>> import copy, torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> _ = noesis.wrap(model)
        >>> part = copy.deepcopy(model[0])
        >>> noesis.unwrap(part)
        Linear(in_features=4, out_features=8, bias=True)
    """
    if isinstance(model, Wrapped):
        model = model.unwrap()
    pipeline, modules = _parts(model)
    detach(modules)
    if pipeline is not None:
        pipeline.detach()
    rebind(model)
    return model


@contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """A model with its own classes for the length of a block, for calls that look modules up by their exact class.

    Nothing is observed inside. Afterwards everything is observed as before, but for modules that were given another
    class inside, which keep it. Compiled code compiles anew on both sides.

    Args:
        model: as for `unwrap`.

    Yields:
        The model; of a container, the model or pipeline in it.

    Raises:
        NoesisError: as for `unwrap`.

    Examples:
        >>> import torch, noesis
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8)))
        >>> with noesis.unwrapped(wrapped) as model:
        ...     type(model[0]) is torch.nn.Linear
        True
        >>> isinstance(wrapped[0], noesis.Observed)
        True
    """
    if isinstance(model, Wrapped):
        model = model.observed_model
    pipeline, modules = _parts(model)
    with ExitStack() as stack:
        stack.callback(rebind, model)
        stack.enter_context(plain(modules))
        if pipeline is not None:
            stack.enter_context(pipeline.detached())
        rebind(model)
        yield model


def _parts(model: Any) -> tuple[Pipeline | None, list[nn.Module]]:
    """The pipeline, if it is one, and all modules."""
    if isinstance(model, nn.Module):
        return None, list(model.modules())
    if hasattr(model, "components") and callable(model):
        components = [part for part in model.components.values() if isinstance(part, nn.Module)]
        return Pipeline.of(model), [module for part in components for module in part.modules()]
    raise BadType(
        f"model is of type {type(model).__name__}", "an nn.Module or a diffusers pipeline", "Pass the model itself"
    )
