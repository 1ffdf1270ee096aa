"""Having chosen modules observed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from loguru import logger
from torch import nn

from ..errors import NoesisError
from ..internals import inside
from ..layers import Layer, Part, mask_arguments, parameters_of
from .gradients import GradientRecorder
from .observed import become_observed, restore, site_of
from .padding import Padding
from .recorder import Recorder
from .site import Row, Site

#: What a denoiser's forward may call its timestep.
TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "sigmas")


def observe(
    recorder: Recorder,
    model: nn.Module,
    chosen: list[Layer],
    roots: list[nn.Module],
    parts: list[Part],
    output: Callable[[Any], Any] | None,
    logits: nn.Module | None,
) -> None:
    """Turn chosen modules, and those whose forwards are steps, into observed ones: all of them, or none.

    Parts that the model may be called by are observed too, where they can be.
    """
    channels = recorder.channels
    gradients = recorder.gradients if isinstance(recorder.gradients, GradientRecorder) else None
    # A module has one site, be it the root, a layer, what gives the logits, or all of them.
    sites: dict[int, tuple[nn.Module, Site]] = {id(root): (root, Site(recorder)) for root in roots}
    for root, site in sites.values():
        site.root = site.starts = site.whole = True
        names = site.parameters = parameters_of(root.forward)
        found = [name for name in TIMESTEPS if name in names]
        if found:
            site.timestep_name, site.timestep = found[0], names.index(found[0])
    by_name = {router.name: router for router in recorder.routers}
    for index, layer in enumerate(chosen):
        module = layer.module
        _, site = sites.setdefault(id(module), (module, Site(recorder)))
        row = Row(layer, index, recorder.places[index], output)
        site.rows.append(row)
        site.name, site.looks = site.name or layer.name, True  # the first row is that of the hidden state, if chosen
        site.gradients = gradients
        site.router = site.router or by_name.get(layer.name)
        if channels is not None and module is not logits:
            row.channel = channels.add(layer.name, module)
    if channels is not None and (logits is not None or channels.logits is not None):
        _, site = sites.setdefault(id(logits or root), (logits or root, Site(recorder)))
        site.doubt, site.looks = channels.see_logits(), True
        if logits is not None:
            site.head = channels.see_head(recorder.settings["logits"])
    asked = set(sites)
    for part in parts:
        _stand_in(sites.setdefault(id(part.module), (part.module, Site(recorder)))[1], part)
    if channels is not None and channels.settings.mask is not None:
        _follow_masks(channels.padding, recorder, model, sites, asked)
    done: list[nn.Module] = []
    try:
        for module, site in sites.values():
            if _became_observed(module, site, asked):
                done.append(module)
    except Exception:
        for module in done:
            restore(module)
        raise
    recorder.observed = [weakref.ref(module) for module in done]


def detach(modules: Iterable[nn.Module], family: str | None = None) -> None:
    """Give observed modules their classes back: all of them, or those of one recorder and its copies."""
    for module in modules:
        site = site_of(module)
        if site is None or (family is not None and site.recorder.family != family):
            continue
        if site.root:
            site.recorder.attached = False
        if not restore(module):
            logger.warning("{} was given another class after wrapping; it keeps it, unobserved", site.name)


def _stand_in(site: Site, part: Part) -> None:
    """Have the forwards of a part begin steps where those of the model do not."""
    if site.root:
        return
    site.name, site.starts, site.whole, site.generates = part.name, True, part.whole, part.generates
    site.parameters = parameters_of(part.module.forward)


def _follow_masks(
    padding: Padding,
    recorder: Recorder,
    model: nn.Module,
    sites: dict[int, tuple[nn.Module, Site]],
    asked: set[int],
) -> None:
    """Have modules say whose mask is around them: observed ones, and those that they are called from."""
    for name, module in _callers(model, asked):
        _, site = sites.setdefault(id(module), (module, Site(recorder)))
        site.name = site.name or name
    for module, site in sites.values():
        site.padding, site.masks = padding, mask_arguments(module.forward, padding.name)


def _callers(model: nn.Module, observed: set[int]) -> list[tuple[str, nn.Module]]:
    """The modules that observed ones are called from, as far as they are parts of them."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule))
        and inside(module) is module
        and any(id(part) in observed for part in module.modules())
    ]


def _became_observed(module: nn.Module, site: Site, asked: set[int]) -> bool:
    """Whether a module became observed; one that nobody asked for need not."""
    try:
        become_observed(module, site)
    except NoesisError as error:
        if id(module) in asked:
            raise
        logger.debug("{}: its calls begin no steps, and masks are not followed there", error)
        return False
    return True
