"""Circuits by construction: what each head does is written into transformers' GPT-2, so that the truth is known.

The residual stream has a subspace for each thing that is said: the token, its position, and what each head writes, each
as one of so many places that is 1. Layer norms are undone by their own weights, as the number of ones is the same
everywhere. A match is found with a score of `sharpness`, and where there is none, BOS with half of it.
A head that no circuit uses has weights of zero: it attends to all alike and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

BOS = 0
#: What the unembedding makes of a one.
LOGIT = 8.0


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts `[pairs, tokens]`, what is right and wrong, and where in them something happens."""

    clean: Tensor
    corrupted: Tensor
    right: Tensor  # [pairs], the answer to the clean prompt
    wrong: Tensor
    mask: Tensor  # [pairs, tokens]; rows are padded on the right
    at: dict[str, Tensor]  # [pairs] each

    @property
    def clean_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.clean, "attention_mask": self.mask}

    @property
    def corrupted_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.corrupted, "attention_mask": self.mask}


@dataclass(frozen=True)
class Circuit:
    """A model, and what it does.

    Attributes:
        model: a GPT2LMHeadModel in eval mode.
        heads: what a head does -> (layer, head).
        edges: from what writes to what reads, as sites: all that weights connect, whether or not it differs in a pair.
        sample: (pairs, seed, corrupt, ragged) -> `Pairs`.
        sharpness: how far the score of a match is above that of none.
    """

    model: Any
    heads: dict[str, tuple[int, int]]
    edges: set[tuple[str, str]]
    sample: Callable[..., Pairs]
    sharpness: float

    def site(self, component: str, head: str) -> str:
        """`z.1.2` of the head that does something."""
        return "{}.{}.{}".format(component, *self.heads[head])


class _Model:
    """A GPT-2 that does nothing yet, and its subspaces."""

    def __init__(self, sizes: dict[str, int], layers: int, heads: int, width: int, positions: int, seed: int) -> None:
        self.width = max(width, -(-sum(sizes.values()) // heads))
        d = heads * self.width
        places = torch.randperm(d, generator=torch.Generator().manual_seed(seed))  # of the stream, in no order
        pieces = places[: sum(sizes.values())].split(list(sizes.values()))
        self.spaces = dict(zip(sizes, pieces, strict=True))
        config = transformers.GPT2Config(
            vocab_size=sizes["token"],
            n_positions=positions,
            n_embd=d,
            n_layer=layers,
            n_head=heads,
            n_inner=4,
            layer_norm_epsilon=0.0,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=BOS,
            pad_token_id=BOS,
        )
        self.model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in self.model.parameters():
            parameter.data.zero_()
        self.model.transformer.wte.weight.data[:] = self.read("token").T
        self.model.transformer.wpe.weight.data[:] = self.read("position").T

    def read(self, space: str) -> Tensor:
        """From the stream to a subspace, `[d, size]`; its transpose writes there."""
        places = self.spaces[space]
        d = self.model.config.n_embd
        return torch.zeros(d, len(places)).index_put_((places, torch.arange(len(places))), torch.ones(len(places)))

    def head(self, place: tuple[int, int], query: Tensor, key: Tensor, value: str, out: str, sharpness: float) -> None:
        """What a head asks for and is found by, `[d, size]` each, and which subspace it moves to which."""
        attention = self.model.transformer.h[place[0]].attn
        d, first = self.model.config.n_embd, place[1] * self.width
        asked, moved = query.shape[1], len(self.spaces[value])
        for part, weights in enumerate((query * sharpness * self.width**0.5, key, self.read(value))):
            begin = part * d + first
            attention.c_attn.weight.data[:, begin : begin + weights.shape[1]] = weights
        assert max(asked, moved) <= self.width
        attention.c_proj.weight.data[first : first + moved] = self.read(out).T

    def finish(self, ones: list[int]) -> Any:
        """Undo the norms, with so many ones at each block and at the end, and read what is answered."""
        d = self.model.config.n_embd
        norms = [(block.ln_1, count) for block, count in zip(self.model.transformer.h, ones[:-1], strict=True)]
        norms += [(block.ln_2, 2) for block in self.model.transformer.h]  # before nothing
        for norm, count in [*norms, (self.model.transformer.ln_f, ones[-1])]:
            mean = count / d
            norm.weight.data.fill_((mean - mean**2) ** 0.5)
            norm.bias.data.fill_(mean)
        self.model.lm_head.weight.data[:] = LOGIT * self.read("out").T
        return self.model


def _drawn(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number from low to high."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _layers(generator: torch.Generator, count: int, heads: int) -> tuple[int, list[tuple[int, int]]]:
    """So many heads in layers of their own, one after the other, and how many layers there are."""
    layers = count + _drawn(generator, 0, 2)
    chosen = torch.randperm(layers, generator=generator)[:count].sort().values.tolist()
    return layers, [(layer, _drawn(generator, 0, heads - 1)) for layer in chosen]


def _ones(layers: int, chosen: list[tuple[int, int]]) -> list[int]:
    """How many ones there are before each block and after the last: token, position, and what was written."""
    return [2 + sum(layer < block for layer, _ in chosen) for block in range(layers + 1)]


def induction(seed: int = 0, sharpness: float | None = None) -> Circuit:
    """Induction: the token that followed this one the last time.

    One head moves each token to the next position, a later one looks for where its own token is the previous one and
    copies what stands there. Sizes, places and sharpness are those of the seed. Without a match, it looks at BOS.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, positions, heads = (_drawn(generator, *bounds) for bounds in ((14, 32), (16, 32), (2, 4)))
    sharp = float(_drawn(generator, 30, 60)) if sharpness is None else sharpness
    layers, (previous, found) = _layers(generator, 2, heads)
    sizes = {"token": tokens, "position": positions, "previous": tokens, "out": tokens}
    built = _Model(sizes, layers, heads, max(tokens, positions), positions, seed)
    position, token = built.read("position"), built.read("token")
    before = position.roll(-1, 1)
    before[built.spaces["position"][0]] = 0  # which has none before it, and itself alone to look at
    built.head(previous, before, position, "token", "previous", sharp)
    keys = built.read("previous") + 0.5 * position[:, :1]  # BOS, where nothing matches
    built.head(found, token, keys, "token", "out", sharp)
    model = built.finish(_ones(layers, [previous, found]))

    def sample(count: int = 16, seed: int = 0, corrupt: str = "before", ragged: bool = False) -> Pairs:
        """`"before"` changes the token that the answer followed, `"answer"` the answer where it stood."""
        generator = torch.Generator().manual_seed(seed)
        most = min(tokens - 3, positions - 2)
        clean = torch.full((count, most + 2), BOS)
        mask = torch.zeros_like(clean)
        corrupted = clean.clone()
        right, wrong, at = [], [], []
        for row in range(count):
            length = _drawn(generator, 4, most) if ragged else most
            order = 1 + torch.randperm(tokens - 1, generator=generator)
            text, spare = order[:length], order[length:]
            place = _drawn(generator, 0, length - 2)
            clean[row, 1 : length + 1], clean[row, length + 1] = text, text[place]
            mask[row, : length + 2] = 1
            corrupted[row] = clean[row]
            corrupted[row, 1 + place + (corrupt == "answer")] = spare[0]
            right.append(text[place + 1])
            wrong.append(spare[0] if corrupt == "answer" else spare[1])
            at.append((1 + place, 2 + place, length + 1))
        names = ("before", "answer", "end")
        where = dict(zip(names, torch.tensor(at).T, strict=True))
        return Pairs(clean, corrupted, torch.stack(right), torch.stack(wrong), mask, where)

    a, b = "{}.{}".format(*previous), "{}.{}".format(*found)
    edges = {("embed", f"{part}.{head}") for part in "qkv" for head in (a, b)}
    edges |= {(f"z.{a}", f"k.{b}"), (f"z.{b}", "logits")}
    return Circuit(model, {"previous": previous, "induction": found}, edges, sample, sharp)


def indirect_object(seed: int = 0, sharpness: float | None = None) -> Circuit:
    """Two names, one of them twice: the answer is the other.

    Where a name stands for the second time, the duplicate head finds the first, and writes that the name was seen. The
    inhibition head looks for such a place and moves the name to the end. The mover looks at names but this one, and
    copies what it finds. Where there is nothing to find, all look at BOS.
    """
    generator = torch.Generator().manual_seed(seed)
    names, fillers, positions, heads = (_drawn(generator, *bounds) for bounds in ((4, 10), (3, 8), (10, 20), (2, 4)))
    tokens = 1 + names + fillers
    sharp = float(_drawn(generator, 30, 60)) if sharpness is None else sharpness
    layers, (duplicate, inhibition, mover) = _layers(generator, 3, heads)
    sizes = {"token": tokens, "position": positions, "seen": tokens, "avoid": tokens, "out": tokens}
    built = _Model(sizes, layers, heads, tokens + positions + 1, positions, seed)
    position, token = built.read("position"), built.read("token")
    of_names = torch.zeros(tokens)
    of_names[1 : 1 + names] = 1
    always, first = position.sum(1, keepdim=True), 0.5 * position[:, :1]  # BOS is found by half, where nothing is
    asked = torch.cat([token * of_names, -position, always], 1)  # this name, and not here
    built.head(duplicate, asked, torch.cat([token, position, first], 1), "token", "seen", sharp)
    seen = (built.read("seen") * of_names).sum(1, keepdim=True)
    built.head(inhibition, always, seen + first, "seen", "avoid", sharp)
    asked = torch.cat([(always - built.read("avoid")) * of_names, always], 1)
    built.head(mover, asked, torch.cat([token * of_names, first], 1), "token", "out", sharp)
    model = built.finish(_ones(layers, [duplicate, inhibition, mover]))

    def sample(count: int = 16, seed: int = 0, corrupt: str = "swap", ragged: bool = False) -> Pairs:
        """`"swap"` repeats the other name instead, `"third"` has a third one in its place."""
        generator = torch.Generator().manual_seed(seed)
        filler = torch.randint(1 + names, tokens, (count, positions), generator=generator)
        clean, mask = filler.clone(), torch.zeros(count, positions, dtype=torch.long)
        clean[:, 0] = BOS
        corrupted = clean.clone()
        right, wrong, at = [], [], []
        for row in range(count):
            length = _drawn(generator, 6, positions) if ragged else positions
            people = 1 + torch.randperm(names, generator=generator)[:3]
            places = 1 + torch.randperm(length - 2, generator=generator)[:3].sort().values
            subject, other = people[:2]
            order = (subject, other) if _drawn(generator, 0, 1) else (other, subject)
            for ids, last in ((clean, subject), (corrupted, people[2] if corrupt == "third" else other)):
                ids[row, places] = torch.stack([*order, last])
                ids[row, length:] = BOS
            mask[row, :length] = 1
            right.append(other)
            wrong.append(subject)
            at.append((*places.tolist(), length - 1))
        where = dict(zip(("first", "second", "again", "end"), torch.tensor(at).T, strict=True))
        return Pairs(clean, corrupted, torch.stack(right), torch.stack(wrong), mask, where)

    a, b, c = ("{}.{}".format(*place) for place in (duplicate, inhibition, mover))
    edges = {("embed", f"{part}.{head}") for part in "qkv" for head in (a, c)} | {
        ("embed", f"q.{b}"),
        ("embed", f"k.{b}"),
    }
    edges |= {(f"z.{a}", f"k.{b}"), (f"z.{a}", f"v.{b}"), (f"z.{b}", f"q.{c}"), (f"z.{c}", "logits")}
    heads_by_name = {"duplicate": duplicate, "inhibition": inhibition, "mover": mover}
    return Circuit(model, heads_by_name, edges, sample, sharp)
