"""Merging over ranks: what many processes saw, as one process over all of their data would tell it.

Nothing is sent unless a process group is given. Rows travel a few steps at a time, which bounds the memory, and are
merged in float64 (`kernels.rows.combine`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from loguru import logger

from .. import files
from ..errors import BadValue, TooLarge
from ..kernels import layout, rows
from ..kernels.layout import CALLS, COUNT, MEAN, ORDER, STD
from ..numerics import Floats, Ints
from ..results import Trace, fields_of, from_known, from_rows, merged_known, names_of, stats_of, to_known, to_rows
from ..text import counted
from .ranks import Ranks, named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Rows of all ranks that are held at a time, in bytes.
PIECE = 1 << 26
#: Rows per sample are not merged but put side by side: at most so many bytes.
MOST_BYTES = 1 << 30


def merge(traces: Sequence[Trace]) -> Trace:
    """The trace of the union of several ranks' data, from theirs.

    Steps are matched by number and layers by name. Ranks may lack steps, layers or everything. What one process over
    the union would have seen is equal up to rounding: a rank's rows are float32, merging them is float64. `calls` is
    the most of any rank, `order` the least, where ranks share layers; layers of a later pipeline stage come after
    those of earlier ones. `batches` add up. A timestep, branch or entry of `meta` that differs is NaN, None, or the
    first rank's, and `meta["ranks"]["differing"]` names it. Samples stand in the order of the ranks.

    Only steps that no rank's ring has dropped stay; totals cover all. Averages, and so soulprints, are exact where
    nothing was dropped. Of dropped steps ranks know only their own averages, which are weighted by elements: exact if
    each rank's share of them never changed, and said in `meta["ranks"]["averages"]`.

    Args:
        traces: one per rank, in the order of the ranks; from `Trace.load`, say.

    Raises:
        NoesisError: without traces, or when they hold different statistics.

    Examples:
        >>> import torch, noesis
        >>> from noesis.distributed import merge
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Identity()), layers="0")
        >>> _ = wrapped(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> first = wrapped.trace()
        >>> wrapped.reset()
        >>> _ = wrapped(torch.tensor([[3.0]]))
        >>> both = merge([first, wrapped.trace()])
        >>> both["count"].item(), both["mean"].item(), round(both["std"].item() ** 2, 6), both.batches
        (4.0, 1.5, 1.666667, array([4]))
    """
    if not traces:
        raise BadValue("No traces", "one per rank", "Pass a list of traces")
    return _merged([_outline(trace) for trace in traces], lambda of: np.stack([of(trace) for trace in traces]))


def merge_over(trace: Trace, earlier: Trace | None, group: ProcessGroup, timeout: float) -> Trace:
    """The same over the ranks of a group, each of which has its own trace; all get the same.

    `earlier` is what a rank has of the run before it was resumed.
    """
    ranks = Ranks(group, timeout)
    ranks.check_in("trace or soulprint")
    outlines = ranks.tell({**_outline(trace), "resumed": earlier is not None})
    whole = _merged(outlines, lambda of: ranks.gather(of(trace)))
    if not any(outline["resumed"] for outline in outlines):
        return whole
    before = replace(trace.at([False] * len(trace)), samples=[]) if earlier is None else earlier
    return whole.after(_merged(ranks.tell(_outline(before)), lambda of: ranks.gather(of(before))))


def _outline(trace: Trace) -> dict[str, Any]:
    """What a rank says of its trace before rows travel, as JSON would hold it."""
    told = {
        "layers": trace.layers,
        "stats": trace.stats,
        "steps": trace.steps.tolist(),
        "names": names_of(trace),
        "dropped": trace.dropped_steps,
        "unmeasured": trace.unmeasured,
        "samples": len(trace.samples),
        "sample_meta": trace.sample_meta(),
        "longest": int(trace.order.max(initial=0)),
        "meta": trace.meta,
    }
    outline: dict[str, Any] = json.loads(files.dump_json(told))
    return outline


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # rows of float64 outputs may hold infinities
def _merged(outlines: list[dict[str, Any]], collect: Callable[[Callable[[Trace], Any]], Any]) -> Trace:
    """The merged trace; `collect` has a function of its trace computed on every rank, and stacks what they give."""
    stats = _same_stats(outlines)
    layers, later = _layers(outlines)
    steps, dropped = _steps(outlines)
    size = len(outlines) * max(1, len(layers)) * len(layout.FIELDS) * 8
    each = max(1, PIECE // size)
    held = [np.zeros((0, len(layers), len(layout.FIELDS)))]
    for start in range(0, len(steps), each):
        part = steps[start : start + each]
        held.append(_combined(collect(partial(_placed, steps=part, layers=layers, later=later))))
    values = np.concatenate(held)
    totals = rows.combine(collect(lambda trace: _totals(trace, layers)))
    averages = _averages(values)
    if dropped:
        averages += _older(collect(lambda trace: _before(trace, steps, layers)))
    names = list(dict.fromkeys(name for outline in outlines for name in outline["names"]))
    known, differing = merged_known(collect(lambda trace: _known(trace, steps, names)))
    whole = Trace(
        values=stats_of(values, stats),
        layers=layers,
        stats=stats,
        totals=stats_of(totals, stats),
        averages=averages,
        dropped_steps=dropped,
        unmeasured=_unmeasured(outlines),
        meta=_meta(outlines, differing, dropped),
        **from_rows(values),
        **from_known(known, names),
    )
    whole.samples = _samples(outlines, collect, whole, later)
    return whole


def _combined(parts: Floats) -> Floats:
    whole: Floats = rows.combine(parts)
    whole[..., CALLS] = parts[..., CALLS].max(0, initial=0.0)  # all ranks together are one model that is called once
    return whole


def _placed(trace: Trace, steps: Ints, layers: list[str], later: dict[str, int]) -> Floats:
    """A trace's rows at these steps and layers [steps, layers, FIELDS]; zero where it has none."""
    placed = np.zeros((len(steps), len(layers), len(layout.FIELDS)))
    _, there, here = np.intersect1d(steps, trace.steps, return_indices=True)
    fields = to_rows(trace, here)
    shift = np.array([later[name] for name in trace.layers], dtype=np.int64)
    fields[..., ORDER] += np.where(fields[..., ORDER] > 0, shift, 0)
    placed[np.ix_(there, _columns(trace, layers))] = fields
    return placed


def _columns(trace: Trace, layers: list[str]) -> Ints:
    place = {name: index for index, name in enumerate(layers)}
    return np.array([place[name] for name in trace.layers], dtype=np.int64)


def _totals(trace: Trace, layers: list[str]) -> Floats:
    placed = np.zeros((len(layers), len(layout.FIELDS)))
    placed[_columns(trace, layers)] = fields_of(trace.totals, trace.stats)
    return placed


def _averages(values: Floats) -> Floats:
    """What a trace averages over steps, from rows [steps, layers, FIELDS]: their number, sums of means and stds."""
    ran = values[..., COUNT] > 0
    std = rows.sample_std(values[..., STD], values[..., COUNT])
    parts = [ran, np.where(ran, values[..., MEAN], 0.0), np.where(ran, std, 0.0)]
    return np.stack([part.sum(0).astype(np.float64) for part in parts], axis=-1)


def _before(trace: Trace, steps: Ints, layers: list[str]) -> Floats:
    """What a rank averaged over the steps that are not kept [layers, 4], and of how many elements."""
    kept = _placed(trace, steps, layers, dict.fromkeys(layers, 0))
    before = np.zeros((len(layers), 4))
    columns = _columns(trace, layers)
    before[columns, :3] = trace.averages
    before[columns, 3] = trace.totals[:, trace.stats.index("count")]
    before[:, :3] -= _averages(kept)
    before[:, 3] -= kept[..., COUNT].sum(0)
    return before


def _older(before: Floats) -> Floats:
    """Averages over dropped steps from the ranks' own [ranks, layers, 4], as if the steps of a rank were all alike."""
    times = before[..., 0]
    often = np.where(times > 0, times, 1.0)
    parts = np.zeros((*times.shape, len(layout.FIELDS)))
    count = np.where(times > 0, before[..., 3] / often, 0.0)
    parts[..., COUNT] = count
    parts[..., MEAN] = np.where(times > 0, before[..., 1] / often, 0.0)
    shrink = np.sqrt(np.maximum(count - 1, 0.0) / np.where(count > 0, count, 1.0))
    parts[..., STD] = np.where(times > 0, before[..., 2] / often, 0.0) * shrink
    whole = rows.combine(parts)
    most = times.max(0)
    std = rows.sample_std(whole[..., STD], whole[..., COUNT])
    return np.stack([most, most * whole[..., MEAN], most * std], axis=-1)


def _known(trace: Trace, steps: Ints, names: list[str]) -> Floats:
    """What a trace knows of these steps [steps, KNOWN]; NaN of those that it has not."""
    known = np.full((len(steps), layout.KNOWN), np.nan)
    _, there, here = np.intersect1d(steps, trace.steps, return_indices=True)
    known[there] = to_known(trace, here, names)
    return known


def _samples(
    outlines: list[dict[str, Any]],
    collect: Callable[[Callable[[Trace], Any]], Any],
    whole: Trace,
    later: dict[str, int],
) -> list[Trace]:
    """The traces of all ranks' samples, one rank's after the other's."""
    numbers = [outline["samples"] for outline in outlines]
    layers, steps, width = whole.layers, whole.steps, len(layout.FIELDS)
    if sum(numbers) * len(steps) * len(layers) * width * 8 > MOST_BYTES:
        raise TooLarge(
            f"{sum(numbers)} samples on {len(outlines)} ranks, over {len(steps)} steps and {len(layers)} layers",
            f"at most {MOST_BYTES >> 30} GiB of rows per sample, which are put side by side and not merged",
            "Merge fewer steps (a smaller capacity), or wrap without per_sample",
        )

    def of(trace: Trace, sample: int) -> Floats:
        """Rows, totals and averages of one sample [layers, steps * FIELDS + stats + 3]."""
        packed = np.zeros((len(layers), len(steps) * width + len(whole.stats) + 3))
        if sample < len(trace.samples):
            own = trace.samples[sample]
            columns = _columns(own, layers)
            packed[:, : len(steps) * width] = _placed(own, steps, layers, later).swapaxes(0, 1).reshape(len(layers), -1)
            packed[columns, len(steps) * width : -3] = own.totals
            packed[columns, -3:] = own.averages
        return packed

    found: list[list[Trace]] = [[] for _ in outlines]
    for sample in range(max(numbers)):
        for rank, packed in enumerate(collect(partial(of, sample=sample))):
            if sample >= numbers[rank]:
                continue
            held = packed[:, : len(steps) * width].reshape(len(layers), len(steps), width).swapaxes(0, 1)
            found[rank].append(
                replace(
                    whole,
                    values=stats_of(held, whole.stats),
                    totals=packed[:, len(steps) * width : -3],
                    averages=packed[:, -3:],
                    samples=[],
                    meta={**whole.meta, **outlines[rank]["sample_meta"][sample]},
                    **from_rows(held),
                )
            )
    return [trace for of_rank in found for trace in of_rank]


# ---------------------------------------------------------------- what the ranks agree on


def _same_stats(outlines: list[dict[str, Any]]) -> tuple[str, ...]:
    first = outlines[0]["stats"]
    for rank, outline in enumerate(outlines):
        if outline["stats"] != first:
            raise BadValue(
                f"Rank {rank} has the statistics {', '.join(outline['stats'])}, rank 0 {', '.join(first)}",
                "the same on all ranks",
                "Pass the same stats= to wrap",
            )
        if len(set(outline["steps"])) != len(outline["steps"]):
            raise BadValue(f"The trace of rank {rank} has a step twice", "each step once", "Load it again")
    return tuple(first)


def _layers(outlines: list[dict[str, Any]]) -> tuple[list[str], dict[str, int]]:
    """All layers, as the ranks name them first, and how far after those of lower ranks each comes in a step."""
    later: dict[str, int] = {}
    last = 0
    for outline in outlines:
        new = [name for name in outline["layers"] if name not in later]
        # A rank counts its own layers only; those of a later pipeline stage run after those of the earlier ones.
        stage = len(new) == len(outline["layers"])
        later.update(dict.fromkeys(new, last if stage else 0))
        last = last + outline["longest"] if stage else max(last, outline["longest"])
    return list(later), later


def _steps(outlines: list[dict[str, Any]]) -> tuple[Ints, int]:
    """The steps that no rank dropped, and how many came before them."""
    first = 0
    for outline in outlines:
        if outline["dropped"]:
            first = max(first, min(outline["steps"], default=0))
    kept = {step for outline in outlines for step in outline["steps"] if step >= first}
    before = [outline["dropped"] + sum(step < first for step in outline["steps"]) for outline in outlines]
    return np.array(sorted(kept), dtype=np.int64), max(before)


def _unmeasured(outlines: list[dict[str, Any]]) -> dict[str, str]:
    """Why layers could not be measured; where not on all ranks that have them, on which."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for outline in outlines for name in outline["unmeasured"]):
        having = [rank for rank, outline in enumerate(outlines) if name in outline["layers"]]
        failed = [rank for rank, outline in enumerate(outlines) if name in outline["unmeasured"]]
        reason = outlines[failed[0]]["unmeasured"][name]
        found[name] = reason if failed == having else f"{reason}; on {named(failed)}"
    return found


def _meta(outlines: list[dict[str, Any]], differing: list[str], dropped: int) -> dict[str, Any]:
    """The first rank's meta, and under `ranks` what was merged and where ranks differ."""
    metas = [{key: value for key, value in outline["meta"].items() if key != "ranks"} for outline in outlines]
    keys = dict.fromkeys(key for meta in metas for key in meta)
    meta = {key: next(meta[key] for meta in metas if key in meta) for key in keys}
    ran = [meta for meta, outline in zip(metas, outlines, strict=True) if outline["steps"]] or metas
    differing = differing + [key for key in keys if key != "run" and any(own.get(key) != meta[key] for own in ran)]
    averages = "exact"
    if dropped:
        averages = f"weighted by elements over the first {counted(dropped, 'step')}, which a ring has dropped"
        logger.warning("averages of the merged trace are {}", averages)
    meta["ranks"] = {
        "merged": len(outlines),
        "runs": [own.get("run") for own in metas],
        "steps": [len(outline["steps"]) for outline in outlines],
        "dropped_steps": [outline["dropped"] for outline in outlines],
        "differing": differing,
        "averages": averages,
    }
    return meta
