"""What is known of one sample of a batch: its number, its guidance branch, and what was asked for it alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..numerics import Ints
from .pipeline_meta import gathered, images_per_prompt

#: Arguments of pipelines that hold one value per prompt, and those that hold one per image.
PER_PROMPT, PER_IMAGE = re.compile(r"(negative_)?prompt(_\d)?|class_labels"), ("seed",)


def sample_meta(
    sample: int, metas: Sequence[dict[str, Any]], branches: Sequence[str | None], batches: Ints
) -> dict[str, Any]:
    """What a sample's meta has beyond, or otherwise than, that of its run.

    Args:
        sample: its number in the batch.
        metas: of each call of the pipeline in the run, or that of the run alone.
        branches: of each step, in the order of the parts of its batch, as `"uncond+cond"`.
        batches: of each step, int64 [steps].

    Returns:
        Its number; its branch, where branches are named, or None where that is not the same in all steps; its own
        prompt, seed and the like, or None where it cannot be told which of several is its own.
    """
    own: dict[str, Any] = {"sample": sample}
    named, images = set(), set()
    for branch, batch in set(zip(branches, batches.tolist(), strict=True)):
        parts = [None] if branch is None else branch.split("+")
        if sample >= batch or batch % len(parts):
            continue
        size = batch // len(parts)
        named.add(parts[sample // size])
        images.add((sample % size, size))
    if any(branch is not None for branch in branches):
        own["branch"] = named.pop() if len(named) == 1 else None
    place = images.pop() if len(images) == 1 else None
    return own | gathered([_of_image(meta, place) for meta in metas])


def _of_image(meta: dict[str, Any], place: tuple[int, int] | None) -> dict[str, Any]:
    """What one call was asked for an image, which is number `place[0]` of `place[1]`."""
    own = {}
    for name, value in meta.items():
        each = 1 if name in PER_IMAGE else images_per_prompt(meta) if PER_PROMPT.fullmatch(name) else None
        if each is None or not isinstance(value, (list, tuple)):
            continue
        fits = place is not None and len(value) * each == place[1]
        if place is not None and fits:
            own[name] = value[place[0] // each]
        else:
            own[name] = value[0] if value and all(other == value[0] for other in value) else None
    return own
