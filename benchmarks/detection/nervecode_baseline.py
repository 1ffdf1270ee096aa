"""nervecode 0.1.1 as a detector, with its defaults or with the settings that its README recommends for this.

It learns codebooks (and projections) by gradient while a model trains. The models compared here are
trained already and have to stay as they are, so its own parameters alone learn from its coding
loss, for the 20 epochs of its benchmark. Its calibration turns scores into percentiles and ranks
nothing anew: it is left out. In eval mode a frozen model gives a layer the same inputs
in every epoch: they are recorded once.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .sets import Case

EPOCHS, BATCH, RATE = 20, 64, 1e-2
FIT_SEQUENCES = 150  # of a language model, whose layers' inputs are many


def nervecode_scores(case: Case, *, recommended: bool) -> dict[str, Tensor] | str:
    """Its surprise for the test set and the out sets (higher is stranger), or why there is none."""
    try:
        nervecode = importlib.import_module("nervecode")
        scoring = importlib.import_module("nervecode.scoring")
        wrapped = wrap(nervecode, copy.deepcopy(case.model), recommended, case.seed)
        learn(wrapped, case)
        aggregate = scoring.max_surprise if recommended else scoring.mean_surprise
        return {name: score(wrapped, x, aggregate) for name, x in {"test": case.test, **case.out}.items()}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def wrap(nervecode: Any, model: nn.Module, recommended: bool, seed: int) -> Any:
    """The wrapped copy; recommended: first linear layer, 16 codes of 8 dimensions, all three weights 1."""
    torch.manual_seed(seed)
    if not recommended:
        return nervecode.wrap(model)
    layers = importlib.import_module("nervecode.layers.wrap")
    wrapped = nervecode.WrappedModel(layers.wrap(model, layers="first_linear", K=16, coding_dim=8))
    for layer in wrapped._wrapped_layers.values():
        layer.assignment.beta_distance = 1.0  # the other two weights are 1 by default
    return wrapped


def learn(wrapped: Any, case: Case) -> None:
    """Train the codebooks and projections on the fit inputs."""
    fit = case.fit[:FIT_SEQUENCES] if case.sequences else case.fit
    layers = wrapped._wrapped_layers
    inputs = layer_inputs(wrapped, fit)
    own = [p for layer in layers.values() for name, p in layer.named_parameters() if not name.startswith("layer.")]
    wrapped.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    loss_of = importlib.import_module("nervecode.training").CodingLoss()
    optimiser = torch.optim.Adam(own, lr=RATE)
    generator = torch.Generator().manual_seed(case.seed)
    batch = 16 if case.sequences else BATCH
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(fit), generator=generator).split(batch):
            traces = {name: layer.forward_with_trace(inputs[name][rows])[1] for name, layer in layers.items()}
            optimiser.zero_grad()
            loss_of(traces).backward()
            optimiser.step()


def layer_inputs(wrapped: Any, fit: Tensor) -> dict[str, Tensor]:
    """What every wrapped layer is given for the fit inputs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in wrapped._wrapped_layers}
    handles = []
    for name, layer in wrapped._wrapped_layers.items():

        def keep(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            seen[name].append(given[0].detach())

        handles.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in fit.split(250):
            wrapped(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def score(wrapped: Any, inputs: Tensor, aggregate: Any) -> Tensor:
    """Its aggregated surprise of each input: [N]."""
    found = []
    with torch.no_grad():
        for batch in inputs.split(250):
            _, traces = wrapped.forward_with_trace(batch)
            found.append(aggregate(traces).surprise.double())
    return torch.cat(found)
