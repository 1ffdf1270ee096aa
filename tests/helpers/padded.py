"""Inputs of unequal lengths, put together with padding: the same samples alone and beside longer ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.of_transformers import IMAGE_TOKEN, PATCHES

#: The arguments of a forward by the numbers of its samples.
Samples = Callable[[Sequence[int]], dict[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """A source of samples, the same ones for a seed."""

    count: int
    generator: torch.Generator

    @classmethod
    def of(cls, count: int, seed: int = 0) -> Drawn:
        return cls(count, torch.Generator().manual_seed(seed))

    def lengths(self, low: int = 5, high: int = 12) -> list[int]:
        return torch.randint(low, high + 1, (self.count,), generator=self.generator).tolist()

    def texts(self, lengths: Sequence[int] | None = None) -> list[Tensor]:
        return [torch.randint(3, 45, (length,), generator=self.generator) for length in lengths or self.lengths()]

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def together(rows: Sequence[Tensor], left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows [length, ...] with zeros up to the longest, and which positions count, as int64."""
    longest = max(map(len, rows))
    values = rows[0].new_zeros((len(rows), longest, *rows[0].shape[1:]))
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        values[index, place], mask[index, place] = row, 1
    return values, mask


def picked(rows: Sequence[Tensor], chosen: Sequence[int]) -> list[Tensor]:
    return [rows[index] for index in chosen]


# ---------------------------------------------------------------- kinds of inputs


def text(drawn: Drawn, *, left: bool = False, numbered: bool = False, dtype: torch.dtype = torch.int64) -> Samples:
    """Words; `numbered` counts positions from the first that is no padding."""
    rows = drawn.texts()

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        ids, mask = together(picked(rows, chosen), left)
        inputs = {"input_ids": ids, "attention_mask": mask.to(dtype)}
        return inputs | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if numbered else {})

    return make


def text_by_query(drawn: Drawn, *, causal: bool, additive: bool, left: bool = False) -> Samples:
    """Words with a mask [N, 1, queries, positions]."""
    plain = text(drawn, left=left, numbered=True)

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        inputs = plain(chosen)
        length = inputs["input_ids"].shape[1]
        seen = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, length, -1)
        if causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
        least = torch.finfo(torch.float32).min
        return inputs | {"attention_mask": torch.zeros(seen.shape).masked_fill(~seen, least) if additive else seen}

    return make


def two_texts(drawn: Drawn, *, masked: bool = True, equal: bool = False) -> Samples:
    """For an encoder and a decoder: whose text is padded too, unless not `masked`, or as long as the other's."""
    rows = drawn.texts()
    others = drawn.texts([len(row) for row in rows] if equal else None if masked else [9] * len(rows))

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        ids, mask = together(picked(rows, chosen))
        other_ids, other_mask = together(picked(others, chosen))
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": other_ids}
        return inputs | ({"decoder_attention_mask": other_mask} if masked else {})

    return make


def sound(drawn: Drawn) -> Samples:
    rows = [drawn.numbers(length) for length in drawn.lengths(120, 300)]

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        values, mask = together(picked(rows, chosen))
        return {"input_values": values, "attention_mask": mask}

    return make


def frames(drawn: Drawn) -> Samples:
    rows = [drawn.numbers(length, 8) for length in drawn.lengths(24, 60)]

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        values, mask = together(picked(rows, chosen))
        return {"input_features": values, "attention_mask": mask}

    return make


def spoken(drawn: Drawn) -> Samples:
    rows, features = drawn.texts(), drawn.numbers(drawn.count, 8, 20)

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        ids, mask = together(picked(rows, chosen))
        return {
            "input_features": features[list(chosen)],
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
        }

    return make


def text_and_image(drawn: Drawn) -> Samples:
    plain, images = text(drawn), drawn.numbers(drawn.count, 3, 16, 16)
    return lambda chosen: plain(chosen) | {"pixel_values": images[list(chosen)]}


def text_with_image(drawn: Drawn) -> Samples:
    """Words in which an image has its place."""
    place = torch.tensor([5, *[IMAGE_TOKEN] * PATCHES])
    rows, images = [torch.cat([place, row]) for row in drawn.texts()], drawn.numbers(drawn.count, 3, 16, 16)

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        ids, mask = together(picked(rows, chosen))
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": images[list(chosen)]}

    return make


def patches(drawn: Drawn, image: int, start: int, end: int) -> Samples:
    """Words with an image of some size, whose patches are rows of one tensor for all samples (Qwen2-VL)."""
    grids = [[(4, 4), (4, 8), (8, 8)][size] for size in torch.randint(0, 3, (drawn.count,), generator=drawn.generator)]
    images = [drawn.numbers(height * width, 96) for height, width in grids]
    rows = [
        torch.cat([torch.tensor([start, *[image] * (height * width // 4), end]), row])
        for row, (height, width) in zip(drawn.texts(), grids, strict=True)
    ]

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        ids, mask = together(picked(rows, chosen))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.cat(picked(images, chosen)),
            "image_grid_thw": torch.tensor([[1, *grids[index]] for index in chosen]),
            "mm_token_type_ids": (ids == image).int(),
        }

    return make


def vectors(drawn: Drawn, *, additive: bool = False, batch_first: bool = True, target: bool = False) -> Samples:
    """What `torch.nn` takes, in whose masks true means padding."""
    kinds = ("src", "tgt") if target else ("src",)
    rows = {kind: [drawn.numbers(length, 16) for length in drawn.lengths()] for kind in kinds}

    def make(chosen: Sequence[int]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for kind in kinds:
            values, mask = together(picked(rows[kind], chosen))
            padding = mask == 0
            if additive:
                padding = torch.zeros(mask.shape).masked_fill(padding, -torch.inf)
            inputs |= {kind: values if batch_first else values.transpose(0, 1), f"{kind}_key_padding_mask": padding}
        return inputs | ({"memory_key_padding_mask": inputs["src_key_padding_mask"]} if target else {})

    return make
