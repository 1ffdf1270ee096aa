"""Which head moves the name? Needs weights, and `pip install 'noesis[interp]'`.

    python examples/indirect_object.py --model DIR_OR_ID

For a GPT-2, or any causal language model that knows its names as single tokens. "When Mary and John went to the store,
John gave a drink to" is answered by the name that came once (Wang et al. 2022, "Interpretability in the wild"). The
corrupted prompt says the other name twice. Each head is patched where the answer is read: a head that moves the name
brings the answer along, and leaves two names alone that are in neither prompt, which is the control.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from noesis import interp

NAMES = [
    *("Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "David", "Emma", "Peter", "Alice", "Robert", "Kate"),
    *("Simon", "Laura", "Mark", "Lily", "Tim", "Sue", "Ben", "Amy", "Max", "Jack", "Lucy"),
]
TEMPLATE = "When {first} and {second} went to the store, {again} gave a drink to"
#: Two of a pair, and two that are in no prompt of it.
LEAST = 4
#: Heads that are looked at more closely.
SHOWN = 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a folder of save_pretrained, or an id: trained weights")
    parser.add_argument("--names", nargs="+", default=NAMES, help="single tokens for the model's tokenizer, at least 4")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="by which names are drawn (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw layers by heads")
    args = parser.parse_args(argv)
    if args.model is None:
        sys.exit("This example needs weights: pass --model, a folder or an id of a trained GPT-2 or the like.")

    local = Path(args.model).is_dir()  # a folder needs no network
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=local)
    tokens = {name: token for name in args.names if (token := token_of(tokenizer, name)) is not None}
    if len(tokens) < LEAST:
        known = ", ".join(tokens) or "none"
        sys.exit(
            f"Of {len(args.names)} names, {len(tokens)} are a single token for this tokenizer ({known}), and at least "
            f"{LEAST} are needed, so that prompts match token by token: pass --names that are, or another model."
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=local).eval()

    clean, corrupted, people = prompts(tokenizer, list(tokens), args.pairs, args.seed)
    right, wrong, *others = (torch.tensor([tokens[each[column]] for each in people]) for column in range(LEAST))
    metric, bystanders = interp.logit_difference(right, wrong), interp.logit_difference(*others)
    with torch.no_grad():
        answered = float((metric(model(**clean)) > 0).double().mean())
    print(f"{tokenizer.decode(clean['input_ids'][0])!r}: {people[0][0]}, not {people[0][1]}")
    print(f"{answered:.0%} of {args.pairs} prompts have the name that came once before the other (chance: 50%)\n")
    if answered < 0.8:
        print("So this model does not do the task, and what moves its answers is no circuit for it.\n")

    anatomy = interp.anatomy(model, **clean)
    options: dict[str, Any] = {"sites": "z", "positions": [-1], "anatomy": anatomy}
    found = interp.patch(model, clean, corrupted, metric, **options)
    needed = interp.patch(model, clean, corrupted, metric, direction="noise", **options)
    print(found)
    if args.plot is not None:
        found.plot(args.plot)

    kept = interp.run(model, clean, keep="z", anatomy=anatomy)
    base = interp.run(model, corrupted, anatomy=anatomy)
    movers = []
    print("\nhead         sufficient  necessary        q  moves its names  moves other names (logits)")
    for effect in found.top(SHOWN):
        site = str(effect.site)
        patched = interp.run(model, corrupted, edits=[interp.Patch(site, kept)], anatomy=anatomy)
        its, other = (float((of(patched.output) - of(base.output)).abs().mean()) for of in (metric, bystanders))
        numbers = f"{effect.mean:>10.3f} {needed[site].mean:>10.3f} {effect.q_value:>8.2g}"
        print(f"{site:<12} {numbers} {its:>16.3f} {other:>18.3f}")
        if effect.q_value <= 0.05 and effect.mean > 0 and its > 2 * other:
            movers.append(site)
    print(f"\nmove the name (q <= 0.05, and twice what they do to other names): {', '.join(movers) or 'none'}")


def token_of(tokenizer: Any, name: str) -> int | None:
    """The token of a name after another word; None where it is unknown, or of several tokens."""
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("and", f"and {name}"))
    one = len(ids) == len(before) + 1 and ids[:-1] == before and ids[-1] != tokenizer.unk_token_id
    return int(ids[-1]) if one else None


def prompts(tokenizer: Any, names: list[str], pairs: int, seed: int) -> tuple[Any, Any, list[list[str]]]:
    """Clean and corrupted prompts, and of each pair the right name, the wrong one, and two that are in neither."""
    generator = torch.Generator().manual_seed(seed)
    people = [[names[at] for at in torch.randperm(len(names), generator=generator)[:LEAST]] for _ in range(pairs)]
    clean, corrupted = [], []
    for number, (right, wrong, *_) in enumerate(people):
        first, second = (right, wrong) if number % 2 else (wrong, right)  # the order of names says nothing
        clean.append(TEMPLATE.format(first=first, second=second, again=wrong))
        corrupted.append(TEMPLATE.format(first=first, second=second, again=right))
    one, other = (tokenizer(texts, return_tensors="pt", return_token_type_ids=False) for texts in (clean, corrupted))
    return dict(one), dict(other), people


if __name__ == "__main__":
    main()
