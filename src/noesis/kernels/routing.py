"""Which experts a router sends its tokens to, counted into its layer's sums of the current step.

State of a device, int64, only ever changed in place:

| tensor | shape | what |
|---|---|---|
| `sums` | [capacity + 2, layers, experts + FIELDS] | a slot per step, one for calls between, one for the whole run |
| `pairs` | [pages + 2, layers, experts, experts] | tokens sent to both experts: latest steps, between, whole run |
| `last` | [layers, 2 + ROWS] | of the latest call: batch, number of the forward, each row's last first choice |

That is 8 * layers * ((capacity + 2) * (experts + FIELDS) + experts**2 + 2 + ROWS) bytes, and per call scratch
for a few copies of the logits.

Everything is a whole number, entropy too (in units of 1 / UNIT nats), so sums do not depend on the
order in which they were made. The reference never waits for the device and serves the CPU as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import register
from .layout import ACTIVE, ENABLED, EVERY, FORWARDS, OBSERVED, SLOT

#: What is summed beside the tokens of each expert: tokens, those whose logits have an entropy, their
#: entropy, pairs of neighbouring tokens, and those of them whose first choice differs.
FIELDS = 5
TOKENS, MEASURED, ENTROPY, NEIGHBOURS, SWITCHES = range(FIELDS)
#: Entropy is kept in whole 1 / UNIT nats, finer than the rounding of a softmax in float32.
UNIT = 1 << 32
#: Rows of a batch that are followed from one forward to the next.
ROWS = 1024
#: Numbers of scratch memory that counting may take at a time.
CHUNK = 1 << 20


def routing_reference(
    logits: Tensor,
    indices: Tensor,
    batch: int,
    layer: Tensor,
    sums: Tensor,
    pairs: Tensor,
    last: Tensor,
    control: Tensor,
) -> None:
    """Add a router's call to the state, decided on the device alone.

    Args:
        logits: floating [..., experts of this layer].
        indices: integers [..., k], the experts chosen for each token; others than the layer's are not counted.
        batch: sequences in the forward, which follow each other in `indices`; 0 when that is not known.
        layer: which of the routers it is, int64 [].
        sums: int64 [capacity + 2, layers, experts + FIELDS].
        pairs: int64 [pages + 2, layers, experts, experts].
        last: int64 [layers, 2 + ROWS].
        control: int64 [CONTROL], see `stepping`.
    """
    experts = pairs.shape[-1]
    logits = logits.reshape(-1, logits.shape[-1]).float()
    chosen = indices.reshape(-1, indices.shape[-1]).long()
    tokens = chosen.shape[0]
    if tokens == 0:
        return
    layer, slot = layer.reshape(1), control[SLOT].reshape(1)
    # What is called before a forward that `every` leaves out goes with it.
    between_steps = slot == sums.shape[0] - 2
    kept = (control[ACTIVE] > 0) & (~between_steps | (control[FORWARDS] % control[EVERY] == 0))

    new = torch.zeros(experts + FIELDS, dtype=torch.int64, device=sums.device)
    together = torch.zeros(experts, experts, dtype=torch.int64, device=sums.device)
    for some in chosen.split(max(1, CHUNK // chosen.shape[1] ** 2)):
        new[:experts] += _histogram(some, experts)
        together += _pairs(some, experts)
    entropy = _entropy(logits)
    measured = entropy.isfinite()
    new[experts + TOKENS] = tokens
    new[experts + MEASURED] = measured.sum()
    new[experts + ENTROPY] = (torch.where(measured, entropy, 0.0) * UNIT).long().sum()
    new[experts + NEIGHBOURS], new[experts + SWITCHES], latest = _switches(
        _first_choice(logits, chosen), batch, last[layer][0], control[FORWARDS]
    )

    sums[slot, layer] += kept * new
    sums[-1][layer] += kept * new
    pages = pairs.shape[0] - 2
    page = torch.where(between_steps, pages, (control[OBSERVED] - 1) % pages)
    pairs[page, layer] += kept * together
    pairs[-1][layer] += kept * together
    last[layer] = torch.where(kept, latest, last[layer])


def _histogram(values: Tensor, bins: int) -> Tensor:
    """How often each of 0 .. bins - 1 occurs; `torch.bincount` would wait for the device."""
    values = values.reshape(-1)
    inside = torch.where((values >= 0) & (values < bins), values, bins)
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, inside, torch.ones_like(inside))[:bins]


def _pairs(chosen: Tensor, experts: int) -> Tensor:
    """[experts, experts]: tokens that chose both; symmetric, 0 on the diagonal."""
    one, other = chosen[:, :, None], chosen[:, None, :]
    valid = (one >= 0) & (one < experts) & (other >= 0) & (other < experts) & (one != other)
    return _histogram(torch.where(valid, one * experts + other, -1), experts * experts).view(experts, experts)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) [tokens] in nats; an expert of probability 0 adds nothing."""
    p = logits.softmax(-1)
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def _first_choice(logits: Tensor, chosen: Tensor) -> Tensor:
    """[tokens]: of the experts chosen, the one of the largest logit, since some routers do not sort them."""
    inside = chosen.clamp(0, logits.shape[1] - 1)
    return chosen.gather(1, logits.gather(1, inside).argmax(1, keepdim=True))[:, 0]


def _switches(
    first: Tensor, batch: int, previous: Tensor, forward: Tensor
) -> tuple[Tensor | int, Tensor | int, Tensor]:
    """Neighbouring tokens, those that differ, and the new row of `last`."""
    latest = torch.zeros_like(previous)
    if batch == 0 or first.shape[0] % batch:
        return 0, 0, latest
    sequences = first.view(batch, -1)  # [batch, tokens of each]
    length = sequences.shape[1]
    neighbours: Tensor | int = batch * (length - 1)
    switches = (sequences[:, 1:] != sequences[:, :-1]).sum()
    if batch > ROWS:
        return neighbours, switches, latest
    if length == 1:  # decoding: the token before was the last of the forward before
        goes_on = (previous[0] == batch) & (previous[1] == forward - 1)
        neighbours = goes_on * batch
        switches = goes_on * (previous[2 : 2 + batch] != first).sum()
    latest[0], latest[1], latest[2 : 2 + batch] = batch, forward, sequences[:, -1]
    return neighbours, switches, latest


def begin_reference(sums: Tensor, pairs: Tensor, control: Tensor) -> None:
    """Start a step, once `stepping` has: it takes over what was called since the last one ended."""
    active, pages = control[ACTIVE] > 0, pairs.shape[0] - 2
    page = torch.where(active, (control[OBSERVED] - 1) % pages, pages).reshape(1)
    for ring, slot in ((sums, control[SLOT].reshape(1)), (pairs, page)):
        pending = ring[-2:-1]
        ring[slot] = torch.where(active, pending, ring[slot])
        pending.mul_(control[ENABLED] == 0)


def routing_cpu(
    logits: Tensor,
    indices: Tensor,
    batch: int,
    layer: Tensor,
    sums: Tensor,
    pairs: Tensor,
    last: Tensor,
    control: Tensor,
) -> None:
    """Count on the CPU, where looking at the flags costs nothing."""
    if control[ACTIVE]:  # on the CPU it costs nothing to ask first
        routing_reference(logits, indices, batch, layer, sums, pairs, last, control)


register(
    "routing(Tensor logits, Tensor indices, SymInt batch, Tensor layer, "
    "Tensor(a!) sums, Tensor(b!) pairs, Tensor(c!) last, Tensor control)",
    cpu=routing_cpu,
    anywhere=routing_reference,
)
register(
    "begin_routing(Tensor(a!) sums, Tensor(b!) pairs, Tensor control)", cpu=begin_reference, anywhere=begin_reference
)
