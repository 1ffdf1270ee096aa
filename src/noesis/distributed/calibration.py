"""Calibration over ranks: each runs its own loader, the first fits to what all collected, and all get the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as pack_safetensors

from ..errors import BadValue, NoesisError, WrongState
from ..numerics import Ints, Reservoir
from ..surprise import DEPENDS, Calibration, Collection, Scorer, Store, read_calibration, written_calibration
from .ranks import Ranks, as_bytes, named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Kind = TypeVar("Kind")


def calibrate_over(
    scorer: Scorer, collect: Callable[[], Collection], by_class: bool, group: ProcessGroup, timeout: float
) -> tuple[Calibration, int]:
    """Calibrate on what all ranks collect, one rank's samples after the other's; the first fits, all get the same.

    Args:
        scorer: of this rank.
        collect: runs this rank's loader, which may be empty.
        by_class: whether each predicted class has p-values of its own.
        group: the ranks.
        timeout: seconds to wait for others once this rank's own loader is through.

    Returns:
        What was learned, and how many samples there were.

    Raises:
        NoesisError: what went wrong, on every rank; the others' error names the rank it comes from.
    """
    ranks = Ranks(group, timeout)
    own, error = _attempt(collect)
    try:
        ranks.check_in("calibrate")
    except NoesisError:
        if error is not None:
            raise error from None
        raise
    told = ranks.tell(_collected(own) | _failure(error))
    _raise_any(error, told, ranks)
    total, chosen = _chosen(told, scorer.settings.seed)
    packed = b"" if own is None else _packed(own, chosen[ranks.rank])
    union = Collection(scorer, {} if own is None else own.uncoded)
    union.reservoir = Reservoir(max(1, sum(map(len, chosen))), np.random.default_rng(scorer.settings.seed))
    union.reservoir.seen = total
    start = 0
    for rank, blob in enumerate(ranks.blobs(packed, keep=ranks.rank == 0)):
        if ranks.rank == 0:
            _add(union, told[rank], parse_safetensors(blob), np.arange(start, start + len(chosen[rank])))
            start += len(chosen[rank])
    made, error = _attempt(lambda: union.fit(by_class)) if ranks.rank == 0 else (None, None)
    _raise_any(error, ranks.tell(_failure(error)), ranks)
    learned = b""
    if ranks.rank == 0:
        arrays, header = written_calibration(scorer)
        learned = pack_safetensors({**arrays, "header": as_bytes(json.dumps(header))})
    learned = next(iter(ranks.blobs(learned)))
    if made is None:
        arrays = parse_safetensors(learned)
        made, books = read_calibration(scorer, arrays, json.loads(arrays.pop("header").tobytes()))
        scorer.adopt(books, made)
    return made, total


def _collected(own: Collection | None) -> dict[str, Any]:
    """What a rank says of its collection before vectors travel."""
    if own is None or own.reservoir is None:
        return {
            "seen": 0,
            "held": 0,
            "room": None,
            "ran": {},
            "widths": {},
            "logits": False,
            "labels": False,
            "padding": {},
        }
    whole = {name: store for name, store in own.values.items() if own.ran[name] == own.seen}
    return {
        "seen": own.seen,
        "held": own.reservoir.held,
        "room": own.reservoir.room,
        "ran": own.ran,
        "widths": {name: list(store.rows().shape[-1:]) for name, store in whole.items()},
        "logits": own.logits is not None and len(own.logits.rows()) == own.reservoir.held,
        "labels": own.labels is not None,
        "padding": own.padding,
    }


def _chosen(told: list[dict[str, Any]], seed: int) -> tuple[int, list[Ints]]:
    """How many samples there are, and which of those held each rank sends: all, or a random choice of the union.

    Raises:
        NoesisError: when the ranks' vectors do not fit together.
    """
    full = [rank for rank, own in enumerate(told) if own["seen"]]
    for rank in full:
        first, own = told[full[0]], told[rank]
        for name, width in own["widths"].items():
            if first["widths"].get(name, width) != width:
                raise BadValue(
                    f"{name} gives {width[0]} numbers a sample on rank {rank}, and {first['widths'][name][0]} on rank "
                    f"{full[0]}",
                    "the same model on all ranks (layers that are split over ranks cannot be calibrated together)",
                    "Leave the layer out",
                )
        for name in ("logits", "labels"):
            if own[name] != first[name]:
                without = rank if first[name] else full[0]
                raise BadValue(f"Rank {without} has no {name}, and others have", f"{name} on all", "Check the ranks")
    seen = [own["seen"] for own in told]
    room = min((told[rank]["room"] for rank in full), default=0)
    shares = seen
    if sum(seen) > room:
        # As many of each rank as a uniform choice from all samples would take.
        shares = np.random.default_rng(seed).multivariate_hypergeometric(seen, room, method="marginals").tolist()
    chosen = []
    for rank, own in enumerate(told):
        kept = np.arange(own["held"])
        if shares[rank] < own["held"]:
            kept = np.sort(np.random.default_rng([seed, rank]).permutation(own["held"])[: shares[rank]])
        chosen.append(kept)
    return sum(seen), chosen


def _packed(own: Collection, chosen: Ints) -> bytes:
    """The chosen samples of a collection."""
    arrays: dict[str, NDArray[Any]] = {"chosen": chosen}
    for index, (name, store) in enumerate(own.values.items()):
        if own.ran[name] == own.seen:
            arrays[f"values.{index}"] = store.rows()[chosen]
            arrays[f"name.{index}"] = as_bytes(name)
        if own.ran[name] == own.seen and name in own.counts:
            arrays[f"counts.{index}"] = own.counts[name].rows()[chosen]
    for name, found in (("logits", own.logits), ("labels", own.labels)):
        if found is not None and len(found.rows()) > max(chosen, default=-1):
            arrays[name] = found.rows()[chosen]
    packed: bytes = pack_safetensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return packed


def _add(union: Collection, told: dict[str, Any], arrays: dict[str, NDArray[Any]], places: Ints) -> None:
    """Put what one rank sent after what those before it have."""
    for name, samples in told["ran"].items():
        union.ran[name] = union.ran.get(name, 0) + samples
    for name, found in told["padding"].items():
        # What ranks do not agree on, padding changes on some of them.
        union.padding[name] = found if union.padding.get(name, found) == found else DEPENDS
    for key, array in arrays.items():
        kind, _, index = key.partition(".")
        if kind in ("values", "counts"):
            stores = union.values if kind == "values" else union.counts
            name = arrays[f"name.{index}"].tobytes().decode()
            stores.setdefault(name, Store()).put(places, array)
    if told["logits"]:
        union.logits = union.logits or Store()
        union.logits.put(places, arrays["logits"])
        union.judged += told["seen"]
    if told["labels"]:
        union.labels = union.labels or Store()
        union.labels.put(places, arrays["labels"])


def _attempt(work: Callable[[], Kind]) -> tuple[Kind | None, Exception | None]:
    """What comes of it, or what went wrong: the other ranks are to hear of it first."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _failure(error: Exception | None) -> dict[str, Any]:
    return {"error": None if error is None else f"{type(error).__name__}: {error}".rstrip(".")}


def _raise_any(error: Exception | None, told: list[dict[str, Any]], ranks: Ranks) -> None:
    """Raise this rank's own error, or one that names the ranks that have one."""
    if error is not None:
        raise error
    failed = [rank for rank, own in enumerate(told) if own["error"] is not None]
    if failed:
        raise WrongState(
            f"calibrate failed on {named([ranks.members[rank] for rank in failed])}: {told[failed[0]]['error']}",
            "every rank to run its loader through",
            "Nothing was calibrated on any rank; mend the first of these",
        )
