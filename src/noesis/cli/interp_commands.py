"""What `noesis interp` does: from parsed arguments to an answer."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .. import files, interp
from ..errors import BadValue
from ..text import escaped, plain, table
from .commands import Answer, Note, draw, language_model
from .outputs import check_outputs
from .prompts import Batch, encode_batch, texts_of, token_of

#: Predictions shown of each layer.
SHOWN = 3


def _anatomy(args: Namespace, _: Note) -> Answer:
    model, tokenizer = language_model(args)
    found = interp.anatomy(model, **_prompts(args, model, tokenizer).inputs)
    return Answer(lambda: repr(found), lambda: files.dump_json(_listed(found)))


def _lens(args: Namespace, note: Note) -> Answer:
    check_outputs([("--out", args.out), ("--plot", args.plot)], args.force)
    model, tokenizer = language_model(args)
    tokens = [token_of(tokenizer, text, "--tokens") for text in args.tokens]
    batch = _prompts(args, model, tokenizer)
    following = batch.inputs["input_ids"][:, 1:].masked_fill(batch.inputs["attention_mask"][:, 1:] == 0, -1)
    found = interp.logit_lens(model, batch.inputs, tokens=tokens or None, next_tokens=following, k=SHOWN)
    _save(found, args.out, note)
    draw(found, args.plot, note, labels=_labels(batch.tokens[:1], len(found.positions)))

    def text() -> str:
        said = [
            [plain(layer), *(f"{escaped(repr(tokenizer.decode([token])))} {share:.2f}" for token, share in best)]
            for layer, best in zip(found.layers, found.top(position=len(batch.tokens[0]) - 1), strict=True)
        ]
        header = ["layer", *(f"{place + 1}." for place in range(len(said[0]) - 1))]
        last = f"after {escaped(repr(batch.tokens[0][-1]))}, the last token of the first prompt:"
        ids = "".join(f"\n{token}: {escaped(repr(name))}" for token, name in zip(tokens, args.tokens, strict=True))
        return f"{found!r}{ids}\n\n{last}\n{table(header, said, most=len(said))}"

    return Answer(text, found.to_json)


def _heads(args: Namespace, note: Note) -> Answer:
    check_outputs([("--out", args.out), ("--plot", args.plot)], args.force)
    model, tokenizer = language_model(args)
    given = args.prompt is not None or args.prompts is not None
    found = interp.heads(model, _prompts(args, model, tokenizer).inputs if given else None, seed=args.seed)
    _save(found, args.out, note)
    draw(found, args.plot, note, kind=args.kind)
    return Answer(lambda: repr(found), found.to_json)


def _patch(args: Namespace, note: Note) -> Answer:
    check_outputs([("--out", args.out), ("--plot", args.plot)], args.force)
    positions = _positions(args.positions)
    pairs = _pairs(args)
    sizes = pairs.clean["attention_mask"].sum(1)
    if isinstance(positions, list) and min(positions) < 0 and sizes.min() < sizes.max():
        raise BadValue(
            f"--positions {min(positions)} of prompts with {int(sizes.min())} to {int(sizes.max())} tokens",
            "positions from 0, as shorter prompts have padding at the end",
            "Count from the first token, or give prompts of one length",
        )
    found = interp.patch(
        *(pairs.model, pairs.clean, pairs.corrupted, pairs.metric),
        sites=args.sites,
        positions=positions,
        direction=args.direction,
    )
    found.meta |= pairs.meta
    _save(found, args.out, note)
    draw(found, args.plot, note, tokens=pairs.labels)
    return Answer(lambda: repr(found), found.to_json)


def _circuit(args: Namespace, note: Note) -> Answer:
    check_outputs([("--out", args.out), ("--plot", args.plot)], args.force)
    pairs = _pairs(args)
    found = interp.circuit(
        *(pairs.model, pairs.clean, pairs.corrupted, pairs.metric),
        method=args.method,
        size=args.size,
        faithfulness=args.faithfulness,
        ablation=args.ablation,
        level=args.level,
        seed=args.seed,
    )
    found.meta |= pairs.meta
    _save(found, args.out, note)
    draw(found, args.plot, note)
    return Answer(lambda: repr(found), found.to_json)


# ---------------------------------------------------------------- what goes in


def _prompts(args: Namespace, model: Any, tokenizer: Any) -> Batch:
    """The prompts of `--prompt` or `--prompts`."""
    if args.prompt is not None:
        return encode_batch(tokenizer, [args.prompt], model.device)
    if not Path(args.prompts).is_file():
        raise BadValue(f"--prompts {args.prompts} is no file", "a file of prompts, one a line", "--prompt takes a text")
    return encode_batch(tokenizer, texts_of(args.prompts), model.device)


class _Pairs(NamedTuple):
    """A model, and pairs of prompts for it."""

    model: Any
    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    metric: interp.Metric
    labels: list[str]  # of positions
    meta: dict[str, list[str]]


def _pairs(args: Namespace) -> _Pairs:
    """The pairs of `--clean` and `--corrupted`, and the metric of `--right` and `--wrong`."""
    clean, corrupted = texts_of(args.clean), texts_of(args.corrupted)
    if len(clean) != len(corrupted):
        raise BadValue(
            f"--clean has {len(clean)} prompts and --corrupted {len(corrupted)}",
            "a corrupted one for each",
            "Pair them",
        )
    model, tokenizer = language_model(args)
    batch = encode_batch(tokenizer, [*clean, *corrupted], model.device)
    _check_pairs(batch.tokens[: len(clean)], batch.tokens[len(clean) :])
    right, wrong = (_answers(tokenizer, args, name, len(clean)) for name in ("right", "wrong"))
    return _Pairs(
        model,
        {name: value[: len(clean)] for name, value in batch.inputs.items()},
        {name: value[len(clean) :] for name, value in batch.inputs.items()},
        interp.logit_difference(right, wrong),
        _labels(batch.tokens, batch.inputs["input_ids"].shape[1]),
        {"clean": clean, "corrupted": corrupted},
    )


def _answers(tokenizer: Any, args: Namespace, name: str, pairs: int) -> list[int]:
    """The tokens of `--right` or `--wrong`, one for each pair."""
    tokens = [token_of(tokenizer, text, f"--{name}") for text in texts_of(getattr(args, name))]
    if len(tokens) not in (1, pairs):
        raise BadValue(f"--{name} has {len(tokens)} tokens for {pairs} pairs", "one for all, or one each", "Pair them")
    return tokens * (pairs // len(tokens))


def _check_pairs(clean: list[list[str]], corrupted: list[list[str]]) -> None:
    for pair, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
        if len(one) != len(other):
            raise BadValue(
                f"pair {pair} has {len(one)} tokens clean and {len(other)} corrupted: {one} and {other}",
                "prompts that match token by token, so that a position means the same in both",
                "Replace words by words of as many tokens",
            )


def _positions(given: list[str]) -> Literal["each", "all"] | list[int]:
    if given == ["each"]:
        return "each"
    if given == ["all"]:
        return "all"
    try:
        return [int(text) for text in given]
    except ValueError:
        raise BadValue(f"--positions {' '.join(given)}", "each, all, or whole numbers", "Pass one of these") from None


# ---------------------------------------------------------------- what comes out


def _labels(tokens: list[list[str]], size: int) -> list[str]:
    """What a position is called: its token, if it is the same in all prompts."""
    columns = ({row[at] for row in tokens if at < len(row)} for at in range(size))
    return [escaped(column.pop()) if len(column) == 1 else "·" for column in columns]


def _listed(found: interp.Anatomy) -> dict[str, Any]:
    """An anatomy as JSON has it."""
    fields = dataclasses.asdict(found)
    fields["shared"] = sorted(found.shared)
    checks = [found.checks, *(block.checks for block in found.blocks)]
    for listed, each in zip((fields, *fields["blocks"]), checks, strict=True):
        listed["checks"] = [{**check._asdict(), "holds": check.holds} for check in each]
    return fields


def _save(result: Any, path: str | None, note: Note) -> None:
    if path is not None:
        note(f"wrote {result.save(path)}")


COMMANDS: dict[str, Callable[[Namespace, Note], Answer]] = {
    "interp anatomy": _anatomy,
    "interp lens": _lens,
    "interp heads": _heads,
    "interp patch": _patch,
    "interp circuit": _circuit,
}
