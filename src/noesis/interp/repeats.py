"""Random tokens that are said again, and where heads of a known kind look in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadValue
from .anatomy import embedding_of, logits_of
from .recording import arguments

#: Rows of random tokens, and the tokens of a row where the model has room.
ROWS, LENGTH = 16, 100
#: Rows by which the tokens that a model expects are found; less than this part of an even share is rare.
SPOKEN, RARE = 4, 0.01


class Text(NamedTuple):
    """What a model reads: tokens and which of them are no padding; None where it reads something else."""

    ids: Tensor | None  # [rows, tokens]
    counts: Tensor | None  # bool [rows, tokens]


def vocabulary(root: nn.Module) -> Tensor | None:
    """The ids of a model's tokens, without those that its configuration calls special; None without an embedding."""
    weight = _embedding(root)
    if weight is None:
        return None
    special: set[int] = set()
    for config in (getattr(root, "config", None), getattr(root, "generation_config", None)):
        for name in dir(config) if config is not None else ():
            if name.endswith("_token_id") and not name.startswith("_"):
                value = getattr(config, name, None)
                special.update(
                    each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)
                )
    return torch.tensor([token for token in range(len(weight)) if token not in special])


def spoken(root: nn.Module, tokens: Tensor, length: int, seed: int) -> Tensor:
    """The tokens that a language model ever expects: those it never saw have embeddings that nothing was done with.

    Of a few rows of random tokens, the mean probability of each token as the next; those of less than a hundredth of an
    even share are left out, unless hardly any are left.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokens[torch.randint(len(tokens), (SPOKEN, length), generator=generator)]
    with torch.no_grad():
        logits = logits_of(root(input_ids=ids.to(next(root.parameters()).device)))
    if logits is None or logits.dim() != 3 or logits.shape[-1] <= int(tokens[-1]):
        return tokens
    share = logits.float().softmax(-1).mean((0, 1)).cpu()[tokens]
    common = tokens[share > RARE / logits.shape[-1]]
    return common if len(common) > length else tokens


def room(root: nn.Module) -> int:
    """How many tokens a row has: a hundred, or as many as the model's configuration has positions."""
    most = getattr(getattr(root, "config", None), "max_position_embeddings", None)
    return min(LENGTH, most) if isinstance(most, int) and most > 0 else LENGTH


def beginning(root: nn.Module) -> int | None:
    """The token that the model's configuration begins rows with (`bos_token_id`), if there is one."""
    found, weight = getattr(getattr(root, "config", None), "bos_token_id", None), _embedding(root)
    return found if isinstance(found, int) and weight is not None and 0 <= found < len(weight) else None


def _embedding(root: nn.Module) -> Tensor | None:
    """The embeddings of tokens `[tokens, width]`."""
    weight = getattr(embedding_of(root), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def repeated(tokens: Tensor, length: int, seed: int, first: int | None = None) -> Tensor:
    """Rows in which random, distinct tokens are said again and again, each row with a period of its own.

    Periods lie between an eighth and a third of the row and are drawn without replacement as long as there are any: a
    head that looks a fixed way back is right in one of them at most.

    Args:
        tokens: ids among which to draw.
        length: of a row.
        seed: of the draws.
        first: an id that each row begins with.

    Returns:
        Ids `[rows, length]`.

    Raises:
        NoesisError: (a ValueError) where there are too few tokens or positions.
    """
    if first is not None:
        return torch.nn.functional.pad(repeated(tokens, length - 1, seed), (1, 0), value=first)
    periods = torch.arange(max(2, length // 8), length // 3 + 1)
    if len(periods) < 2 or len(tokens) < int(periods[-1]):
        raise BadValue(
            f"the model has {len(tokens)} tokens that are not special, and {length} positions",
            "room for three copies of a few random tokens",
            "Pass inputs=, rows of tokens that are said again",
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat([periods[torch.randperm(len(periods), generator=generator)] for _ in range(ROWS)])[:ROWS]
    rows = []
    for period in drawn.tolist():
        some = tokens[torch.randint(len(tokens), (4 * period,), generator=generator)].unique()
        if len(some) < period:  # of a small vocabulary
            some = tokens
        said = some[torch.randperm(len(some), generator=generator)[:period]]
        rows.append(said[torch.arange(length) % period])
    return torch.stack(rows)


def text_of(inputs: Any) -> Text:
    """The tokens among what a model is called with, and its padding mask."""
    args, kwargs = arguments(inputs)
    found = kwargs.get("input_ids", next((value for value in args if isinstance(value, Tensor)), None))
    if not isinstance(found, Tensor) or found.dim() != 2 or found.is_floating_point():
        return Text(None, None)
    mask = kwargs.get("attention_mask") if isinstance(kwargs, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.shape == found.shape
    return Text(found.cpu(), mask.cpu().bool() if fits else None)  # type: ignore[union-attr]


def targets(ids: Tensor | None, visible: Tensor) -> dict[str, Tensor]:
    """Where heads of each kind look: bool `[rows, queries, keys]` by kind.

    | kind | keys of query i |
    |---|---|
    | previous | i - 1 |
    | duplicate | all j < i with the same token, but for the first, where attention rests |
    | induction | all j <= i after an earlier copy of the token |
    | first | the first one that is visible |

    Source: Olsson et al. 2022 (previous token, prefix matching); Wang et al. 2022, "Interpretability in the wild"
    (duplicate tokens).

    Args:
        ids: `[rows, tokens]`; without, only what needs no tokens.
        visible: bool `[rows, queries, keys]`, of self-attention.
    """
    length = visible.shape[-1]
    first = torch.zeros_like(visible)
    first.scatter_(2, visible.int().argmax(2, keepdim=True), value=True)
    found = {"first": first & visible}
    if ids is None:
        return found
    same = ids[:, :, None] == ids[:, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
    duplicate = same & earlier
    induction = torch.zeros_like(duplicate)
    induction[:, :, 1:] = duplicate[:, :, :-1]  # j follows j - 1 < i
    duplicate = duplicate & (torch.arange(length) > 0)
    previous = torch.eye(length, dtype=torch.bool).roll(-1, 1).tril(-1)
    found |= {"previous": previous.expand_as(visible), "duplicate": duplicate, "induction": induction}
    return {kind: where & visible for kind, where in found.items()}
