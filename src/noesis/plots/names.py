"""Names in pictures: short, on one line, and no two of them alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

#: Characters of a layer name that are shown.
LONGEST_LABEL = 40
#: Characters of what a run is called.
LONGEST_RUN = 40
#: What people tell runs by, in this order.
TELLING = ("prompt", "negative_prompt", "seed", "model", "run")
#: What differs between any two runs and tells nobody anything, as a run does that was given no name.
IDS = ("pipeline_calls", "resumed")
ID = re.compile("[0-9a-f]{8,}")
#: How many things a run is called by.
MOST_THINGS = 2


def shortened_names(names: Sequence[Any], longest: int = LONGEST_LABEL) -> list[str]:
    """Names of one picture; what is too long is shortened in the middle, first where paths are alike.

    Inner words go that tell none of the names from another, the longest first, then ends of words. Different names
    stay different.

    Examples:
        >>> from noesis.plots import shortened_names
        >>> paths = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default" for i in (0, 11)]
        >>> shortened_names(paths)
        ['base_model.model.model…0…lora_A.default', 'base_model.model.model…11…lora_A.default']
    """
    texts = [str(name) for name in names]
    parted = _without_what_is_alike(texts, longest)
    room = longest
    while True:
        short = [shortened(text, room) for text in parted]
        if len(set(short)) == len(set(texts)) or room >= max(map(len, texts)):
            return short
        room += longest // 2


def _without_what_is_alike(texts: list[str], longest: int) -> list[str]:
    """Dotted names, the long ones with an ellipsis where inner words follow in all names that begin like them."""
    after: defaultdict[tuple[str, ...], set[str | None]] = defaultdict(set)
    paths = [tuple(text.split(".")) for text in texts]
    for path in paths:
        for at, word in enumerate((*path, None)):
            after[path[:at]].add(word)
    short = []
    for path in paths:
        alike = [at for at in range(1, len(path) - 1) if len(after[path[:at]]) == 1]
        alike.sort(key=lambda at: -len(path[at]))
        kept = set(range(len(path)))
        while alike and len(_joined(path, kept)) > longest:
            kept.remove(alike.pop(0))
        short.append(_joined(path, kept))
    return short


def _joined(path: tuple[str, ...], kept: set[int]) -> str:
    """Some words of a path, with dots between neighbours and an ellipsis where others were."""
    text = path[0]
    for at in range(1, len(path)):
        if at in kept:
            text += ("." if at - 1 in kept else "…") + path[at]
    return text


def shortened(name: Any, longest: int = LONGEST_LABEL) -> str:
    """A name on one line; of a long dotted one the words before the last are cut, its numbers are not.

    Examples:
        >>> from noesis.plots import shortened
        >>> shortened("down_blocks.1.attentions.0.transformer_blocks.5.attn1.to_q")
        'down_bl…1.attenti…0.transfo…5.attn1.to_q'
    """
    text = "".join(char if char.isprintable() else "·" for char in str(name))
    *parts, last = re.split("([.…])", text)
    words, ends = parts[::2], parts[1::2]
    kept = [len(word) for word in words]

    def cut() -> str:
        # A cut word's ellipsis stands for what ended it too.
        found = zip(words, kept, ends, strict=True)
        return "".join(word[:size] + (end if size == len(word) else "…") for word, size, end in found) + last

    while len(cut()) > longest and max(kept, default=0) > 3:
        kept[kept.index(max(kept))] -= 1
    text = cut()
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[-tail:]}"


def run_names(metas: Sequence[Mapping[str, Any]]) -> list[str]:
    """Runs by what differs in their meta, what people tell runs by first; by letters where nothing does.

    Examples:
        >>> from noesis.plots import run_names
        >>> run_names([{"prompt": "a coat", "seed": 1, "dtype": "float16"}, {"prompt": "a coat", "seed": 2}])
        ['seed 1, dtype float16', 'seed 2, no dtype']
    """
    letters = [chr(ord("a") + at) for at in range(len(metas))]
    keys = dict.fromkeys([*TELLING, *(key for meta in metas for key in meta if key not in IDS)])
    columns = {key: [_in_words(key, meta.get(key)) for meta in metas] for key in keys}
    telling = [key for key, texts in columns.items() if len(set(texts)) > 1][:MOST_THINGS]
    if not telling:
        return letters
    longest = LONGEST_RUN // len(telling)
    found = [", ".join(_called(key, columns[key][at], longest) for key in telling) for at in range(len(metas))]
    return found if len(set(found)) == len(found) else [f"{a}: {b}" for a, b in zip(letters, found, strict=True)]


def _in_words(key: str, value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or (key == "run" and ID.fullmatch(str(value))):
        return "none"
    return str(value)


def _called(key: str, text: str, longest: int) -> str:
    if text == "none":
        return f"no {key.replace('_', ' ')}"
    if key == "model":
        text = text.rstrip("/").rsplit("/", 1)[-1]
    text = shortened(text, longest)
    return f"“{text}”" if key == "prompt" else f"{key.replace('_', ' ')} {text}"
