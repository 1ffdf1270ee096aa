"""Having chosen modules observed."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from loguru import logger
from torch import nn

from ..errors import NoesisError
from ..layers import Layer, Part
from .gradients import GradientRecorder
from .observed import become_observed, restore, site_of
from .recorder import Recorder
from .site import Row, Site

#: What a denoiser's forward may call its timestep.
TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "sigmas")


def observe(
    recorder: Recorder,
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
        names = _parameters(root.forward)
        found = [name for name in TIMESTEPS if name in names]
        if found:
            site.timestep_name, site.timestep = found[0], names.index(found[0])
        if channels is not None and channels.settings.mask in names:
            site.mask = names.index(channels.settings.mask)
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
    standing_in = {id(part.module): part for part in parts}
    for key, part in standing_in.items():
        if key in sites:
            _stand_in(sites[key][1], part)
    done: list[nn.Module] = []
    try:
        for module, site in sites.values():
            become_observed(module, site)
            done.append(module)
    except Exception:
        for module in done:
            restore(module)
        raise
    # These were not asked for: one that cannot be observed is left as it is, and does not stand in.
    done += [part.module for key, part in standing_in.items() if key not in sites and _could(part, Site(recorder))]
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
    channels, names = site.recorder.channels, _parameters(part.module.forward)
    if channels is not None and channels.settings.mask in names:
        site.mask = names.index(channels.settings.mask)


def _could(part: Part, site: Site) -> bool:
    """Whether a part that was not chosen could be turned into an observed one."""
    _stand_in(site, part)
    try:
        become_observed(part.module, site)
    except NoesisError:
        return False
    return True


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # a builtin put in the place of forward
        return []
